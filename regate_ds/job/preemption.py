"""End a training run early on request: finish the step, save a checkpoint, exit.

SIGTERM or SIGUSR1, sent to any one rank, is the request. A run that exits with ``EXIT_CODE`` can be
started again with ``run.resume=auto``.
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
"""Exit code of a run that was asked to end and has saved: EX_TEMPFAIL, "try again later"."""

_TOO_LATE = 128 + signal.SIGTERM

_END = b"\0"
"""Ends the stream of signal numbers; no signal has this number."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_REQUESTS = tuple(bytes([number]) for number in SIGNALS)


class Preempted(Exception):
    """The run has saved and ends early. The message, on the first rank only, says where."""


class StopRequest:
    """Whether this process has been asked to end."""

    def __init__(self) -> None:
        self._asked, self._over = threading.Event(), threading.Event()

    @property
    def is_asked(self) -> bool:
        return self._asked.is_set()

    def watch(self, signals: int, grace_seconds: float | None) -> None:
        """Wait for a request in the file ``signals``; end the process after the grace time.

        Runs in a thread of its own, because the main one may wait for other ranks for hours.
        """
        # Other signals come here too, such as the end of a child, which torch's loaders use.
        while (number := os.read(signals, 1)) not in _REQUESTS:
            if number == _END:
                return
        self._asked.set()
        if grace_seconds is None or self._over.wait(grace_seconds):
            return
        line = f"regate train: not saved within run.grace_seconds={grace_seconds}; raise it\n"
        os.write(sys.stderr.fileno(), line.encode())
        os._exit(_TOO_LATE)

    def end(self) -> None:
        """Stop the grace time."""
        self._over.set()


@contextmanager
def listening(grace_seconds: float | None = None) -> Iterator[StopRequest]:
    """Take SIGTERM and SIGUSR1 as a request to end. For the main thread only."""
    request = StopRequest()
    signals, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    thread = threading.Thread(target=request.watch, args=(signals, grace_seconds), daemon=True)
    thread.start()
    old_wakeup = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    before = {number: signal.signal(number, _caught) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_wakeup)
        request.end()
        os.write(wakeup, _END)
        thread.join()
        os.close(wakeup)
        os.close(signals)


def _caught(_: int, __: FrameType | None) -> None:
    """Do nothing: Python has written the signal's number to the wake-up file."""


def leave_to_parent(_: int = 0) -> None:
    """Ignore the signals in a worker that decodes images: a whole process group gets them, and the
    step in progress still needs the worker."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def restore_signals() -> None:
    """Let SIGUSR1 end this process again, if launch/ had its launchers (and so this) ignore it."""
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
