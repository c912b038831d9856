#!/usr/bin/env python
"""Run a pretrain script of Megatron-LM with elision, and with its own arguments.

    torchrun ... launch/pretrain_wrapper.py --regate-config FILE pretrain_gpt.py --num-layers 32 ...

FILE (YAML) holds the keys of LoopSettings in regate_ds/adapters/megatron/loops/deferred.py;
docs/megatron_lm.md has an example. The script is not changed and sees none of this.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from regate_ds.settings.section import read_section
from regate_ds.settings.yaml import read_yaml

FLAG = "--regate-config"
USAGE = f"usage: pretrain_wrapper.py {FLAG} FILE SCRIPT [ARGUMENT ...]"


def taken_out(arguments: list[str]) -> tuple[str, list[str]]:
    """Return the value of our flag, and the script with its own arguments.

    SystemExit if the flag or the script is missing, or the flag is given twice.
    """
    joined = [n for n, text in enumerate(arguments) if text.startswith(f"{FLAG}=")]
    apart = [n for n, text in enumerate(arguments) if text == FLAG]
    if len(joined) + len(apart) != 1:
        sys.exit(f"{FLAG} is given {len(joined) + len(apart)} times; give it once; {USAGE}")
    at = (joined + apart)[0]
    rest = arguments[:at] + arguments[at + (1 if joined else 2) :]
    value = arguments[at].partition("=")[2] if joined else "".join(arguments[at + 1 : at + 2])
    if not value or not rest:
        sys.exit(USAGE)
    return value, rest


def main() -> None:
    config, command = taken_out(sys.argv[1:])
    script = Path(command[0])
    for path, what in ((script, "the pretrain script"), (Path(config), f"a file as {FLAG}")):
        if not path.is_file():
            sys.exit(f"{path} is not there: give the path of {what}")
    # Set the path as python itself would, before the first import of megatron: the script must get
    # the megatron that lies beside it.
    sys.argv = command
    sys.path[0] = str(script.resolve().parent)
    from regate_ds.adapters.megatron.loops.deferred import LoopSettings
    from regate_ds.adapters.megatron.loops.megatron_lm import installed

    settings = read_section(LoopSettings, read_yaml(Path(config).read_text()), where="")
    with installed(settings):
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
