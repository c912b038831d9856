"""Print the error of a failed command as one line for the whole job. Imports no framework."""

from __future__ import annotations

import errno
import sys
import time

from regate_ds.job.ranks import Ranks, discover

USER_ERRORS = (ValueError, RuntimeError, OSError, ImportError)
"""Errors for a wrong input, a missing file or package, or a run that cannot go on."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors of a disk, or of a user's share of it, that is full."""

_FIRST_SPEAKS_SECONDS = 15.0
"""Seconds that other ranks wait before they print: launchers end them sooner after a failure."""


class JobFailed(RuntimeError):
    """The failure of a rank, this one or another, with the same text on every rank of the job."""

    def __init__(self, text: str, *, is_printed: bool) -> None:
        """Make the error. is_printed: another rank or another thread has printed the text."""
        super().__init__(text)
        self.is_printed = is_printed


def print_error(command: str, error: BaseException) -> None:
    """Print the error, unless another rank of the job prints it."""
    if isinstance(error, JobFailed):
        if not error.is_printed:
            # The first rank's progress bar may still lack an end of line.
            _print(command, error, before="\n")
        return
    ranks = _ranks()
    if ranks.rank == 0:
        _print(command, error)
        return
    # Ranks that have not joined cannot agree on who prints; most errors are the same on all.
    time.sleep(_FIRST_SPEAKS_SECONDS)
    _print(f"{command}: rank {ranks.rank}", error)


def one_line(error: BaseException) -> str:
    """Return the error's message without line breaks, or its type if it has no message."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in _FULL:
        # A write into a file that was opened before does not say which.
        what = "a file of this job" if error.filename is None else error.filename
        again = "make room there, then give the same command again"
        return f"there is no room for {what} ({error.strerror}); {again}"
    return text or f"{type(error).__name__} without a message; --debug shows where"


def _print(who: str, error: BaseException, before: str = "") -> None:
    print(f"{before}regate {who}: {one_line(error)}", file=sys.stderr, flush=True)


def _ranks() -> Ranks:
    try:
        return discover()
    except ValueError:
        # This may be the error that is being printed.
        return Ranks("none")
