"""Run a regate command on several ranks of this machine, by the deepspeed launcher.

    python -m regate_ds.job.deepspeed_launcher RANKS COMMAND [ARGUMENT ...]

launch/local.sh is the same.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO


def launch(
    ranks: int, arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Exit code, and the command's own line about its error ("" if it wrote none).

    The launcher ends in a traceback of its own, below which the ranks' error is easily lost.
    """
    port = os.environ.get("MASTER_PORT") or str(free_port())
    options = ["--num_gpus", str(ranks), "--master_port", port, "--no_local_rank"]
    program = str(Path(sys.executable).with_name("deepspeed"))
    command = [program, *options, "--log_level", "warning"]
    command += ["--module", "regate_ds.cli", *arguments]
    print(" ".join(command), file=sys.stderr, flush=True)
    # Inherited: deepspeed's own processes ignore it; ranks take it as a request to save and end.
    before = {signal.SIGUSR1: signal.signal(signal.SIGUSR1, signal.SIG_IGN)}
    job = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    assert job.stderr is not None
    ask = partial(_ask_ranks, job.pid)
    before[signal.SIGTERM] = signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGUSR1, ask)
    try:
        said = _pass_on(job.stderr)
        return _exit_code(job.wait()), said
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def report(code: int, said: str) -> None:
    """The last line a user sees of a command that failed."""
    if not said and code == 128 + signal.SIGKILL:
        said = "a rank was killed: by hand, by the system for want of memory, or by a scheduler"
    print(f"exit code {code}{': ' if said else ''}{said}", file=sys.stderr)


def _pass_on(errors: IO[bytes]) -> str:
    """Show what the ranks write, as they write it (bars have no line ends), and find the error:
    the first, because ranks that lose a peer end in errors of their own.
    """
    said, line = b"", b""
    while chunk := os.read(errors.fileno(), 65536):
        os.write(sys.stderr.fileno(), chunk)
        *whole, line = (line + chunk).replace(b"\r", b"\n").split(b"\n")
        said = said or next((one for one in whole if one.startswith(b"regate ")), b"")
    return said.decode(errors="replace")


def _ask_ranks(launcher: int, *_: object) -> None:
    """deepspeed's runner itself would end on SIGTERM, and leave its ranks behind."""
    import psutil

    for process in psutil.Process(launcher).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGUSR1)


def _exit_code(code: int) -> int:
    """As a shell has it: 128 and the signal's number. deepspeed passes on 256 less the number."""
    code = code - 256 if code > 192 else code
    return code if code >= 0 else 128 - code


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(argv: Sequence[str]) -> int:
    code, said = launch(int(argv[0]), argv[1:])
    if code:
        report(code, said)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
