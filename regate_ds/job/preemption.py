"""What a training run does when the machine is wanted back: finish the step, save, and end.

SIGTERM and SIGUSR1 ask for it, on any one rank. Whoever sends them may start the run again, with
``run.resume=auto``, when it ends with ``EXIT_CODE``.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 75
"""Of a run that was asked to end and has saved a checkpoint: EX_TEMPFAIL, "try again later"."""

_TOO_LATE = 128 + signal.SIGTERM

_END = b"\0"
"""No signal's number: nothing more will come."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_REQUESTS = tuple(bytes([number]) for number in SIGNALS)


class Preempted(Exception):
    """The run has saved and ends early; its message, on the first rank only, says where."""


class StopRequest:
    """Whether this process has been asked to end."""

    def __init__(self) -> None:
        self._asked, self._over = threading.Event(), threading.Event()

    @property
    def is_asked(self) -> bool:
        return self._asked.is_set()

    def watch(self, signals: int, grace_seconds: float | None) -> None:
        """Wait for a signal's number in this file; if then the grace time passes, end the process.

        In a thread of its own, because the main one may wait for other ranks for hours.
        """
        # Others come here too, as that of a child that has ended: torch's loaders listen for it.
        while (number := os.read(signals, 1)) not in _REQUESTS:
            if number == _END:
                return
        self._asked.set()
        if grace_seconds is None or self._over.wait(grace_seconds):
            return
        line = f"regate train: not saved within run.grace_seconds={grace_seconds}\n"
        os.write(sys.stderr.fileno(), line.encode())
        os._exit(_TOO_LATE)

    def end(self) -> None:
        """The grace time no longer runs."""
        self._over.set()


@contextmanager
def listening(grace_seconds: float | None = None) -> Iterator[StopRequest]:
    """Take SIGTERM and SIGUSR1 as a request; the main thread only."""
    request = StopRequest()
    signals, caught = os.pipe()
    os.set_blocking(caught, False)
    thread = threading.Thread(target=request.watch, args=(signals, grace_seconds), daemon=True)
    thread.start()
    woken = signal.set_wakeup_fd(caught, warn_on_full_buffer=False)
    before = {number: signal.signal(number, _caught) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        request.end()
        os.write(caught, _END)
        thread.join()
        os.close(caught)
        os.close(signals)


def _caught(_: int, __: FrameType | None) -> None:
    """The wake-up file has it already."""


def leave_to_parent(_: int = 0) -> None:
    """In a worker that decodes images: the signals go to a whole group, and it is still needed."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def restore_signals() -> None:
    """End by SIGUSR1 again where launch/ had its launchers ignore it, until training listens."""
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
