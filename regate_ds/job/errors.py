"""How a command that fails says so: one line for the whole job. Imports no framework."""

from __future__ import annotations

import sys
import time

from regate_ds.job.ranks import Ranks, discover

USER_ERRORS = (ValueError, RuntimeError, OSError, ImportError)
"""What a wrong input, a missing file or package, or a broken promise of the host ends in."""

_FIRST_SPEAKS_SECONDS = 15.0
"""Longer than launchers take to end the other ranks after one has failed."""


class JobFailed(RuntimeError):
    """A rank has failed, this one or another: the same text on every rank of the job."""

    def __init__(self, text: str, *, is_printed: bool) -> None:
        """is_printed: another rank, or another thread, has said it to the user."""
        super().__init__(text)
        self.is_printed = is_printed


def print_error(command: str, error: BaseException) -> None:
    """Print the error, unless another rank of the job does."""
    if isinstance(error, JobFailed):
        if not error.is_printed:
            # The first rank's progress bar has no end of line yet.
            _print(command, error, before="\n")
        return
    ranks = _ranks()
    if ranks.rank == 0:
        _print(command, error)
        return
    # Before they have joined, ranks cannot agree on who speaks; most errors are the same on all.
    time.sleep(_FIRST_SPEAKS_SECONDS)
    _print(f"{command}: rank {ranks.rank}", error)


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or f"{type(error).__name__} without a message; --debug shows where"


def _print(who: str, error: BaseException, before: str = "") -> None:
    print(f"{before}regate {who}: {one_line(error)}", file=sys.stderr, flush=True)


def _ranks() -> Ranks:
    try:
        return discover()
    except ValueError:
        # That may be the very error.
        return Ranks("none")
