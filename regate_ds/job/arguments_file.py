"""Run a regate command whose arguments lie in a file, for launchers that pass them by a shell.

    python -m regate_ds.job.arguments_file FILE

pdsh joins a command's words for the shell of each node, which would split and expand them, and
replaces %n, %h and %u itself. launch/deepspeed.sh therefore writes the arguments into the folder
that all nodes share, each with a zero byte after it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from regate_ds.cli import main


def read_arguments(path: Path) -> list[str]:
    """Return the arguments, byte for byte as they were written."""
    *arguments, rest = path.read_bytes().split(b"\0")
    assert not rest, f"{path} was not written to its end"
    return [argument.decode("utf-8", "surrogateescape") for argument in arguments]


if __name__ == "__main__":
    sys.exit(main(read_arguments(Path(sys.argv[1]))))
