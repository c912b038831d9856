"""Run a regate command on several ranks of this node, with the deepspeed launcher.

    python -m regate_ds.job.deepspeed_launcher RANKS COMMAND [ARGUMENT ...]

launch/local.sh does the same.
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
from typing import IO


def launch(
    ranks: int, arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Run the command; return its exit code and the line it printed about its error, or "".

    The line is returned because the launcher's own traceback follows it and may hide it.
    """
    port = os.environ.get("MASTER_PORT") or str(free_port())
    options = ["--num_gpus", str(ranks), "--master_port", port, "--no_local_rank"]
    # Not the command `deepspeed`, which may lie elsewhere, or belong to another Python.
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *options]
    command += ["--log_level", "warning"]
    command += ["--module", "regate_ds.cli", *arguments]
    print(" ".join(command), file=sys.stderr, flush=True)
    # Children inherit this: deepspeed's own ignore SIGUSR1; ranks then listen for it themselves.
    before = {signal.SIGUSR1: signal.signal(signal.SIGUSR1, signal.SIG_IGN)}
    job = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    assert job.stderr is not None
    ask = partial(_ask_ranks, job.pid)
    before[signal.SIGTERM] = signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGUSR1, ask)
    try:
        error_line = _pass_on(job.stderr)
        return _exit_code(job.wait()), error_line
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def report(code: int, error_line: str) -> None:
    """Print the last line that a user sees of a command that failed."""
    if not error_line and code == 128 + signal.SIGKILL:
        error_line = "a rank was killed: by hand, by the system (no memory left), or by a scheduler"
    print(f"exit code {code}{': ' if error_line else ''}{error_line}", file=sys.stderr)


def _pass_on(errors: IO[bytes]) -> str:
    """Copy what the ranks write to stderr at once (bars have no line ends); return the first error.

    Later errors may be those of ranks that lost a peer.
    """
    error_line, rest = b"", b""
    while chunk := os.read(errors.fileno(), 65536):
        os.write(sys.stderr.fileno(), chunk)
        *lines, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
        error_line = error_line or next((x for x in lines if x.startswith(b"regate ")), b"")
    return error_line.decode(errors="replace")


def _ask_ranks(launcher: int, *_: object) -> None:
    """Send SIGUSR1 to the ranks: deepspeed's runner would end on SIGTERM and leave them behind."""
    import psutil

    for process in psutil.Process(launcher).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGUSR1)


def _exit_code(code: int) -> int:
    """Return a signal as 128 plus its number, as a shell does; deepspeed gives 256 minus it."""
    code = code - 256 if code > 192 else code
    return code if code >= 0 else 128 - code


def free_port() -> int:
    """Find a port of this node that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(argv: Sequence[str]) -> int:
    code, error_line = launch(int(argv[0]), argv[1:])
    if code:
        report(code, error_line)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
