"""Tell all ranks at once when one of them fails or dies, whatever they are waiting for.

Each rank holds a connection to the first rank as long as it lives. A rank that fails sends a
message over it. If a rank is killed, the system closes the connection; if its node is gone,
keep-alive probes find that out; if it is stopped, it gives no sign of life any more. The first rank
sends the first failure that it hears of to all.

A rank sends a token first, and says nothing more before it is answered. Then it gives signs of
life, which are answered, with what it is doing. One that leaves in order sends ``null`` as text.
"""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from regate_ds.job.connection import Lines, connect, send
from regate_ds.job.hub import ALIVE, DIED, LOOKS, SILENT, Hub, silent

_TRUST_SECONDS = 5.0
"""Seconds that a failing rank waits to hear whether another one failed before."""

SumOverRanks = Callable[[Sequence[int]], list[int]]
"""Sums integers over all ranks."""


@dataclass(frozen=True)
class Failure:
    """The failure that ended the job; it is the same on every rank."""

    rank: int
    text: str

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.text}"

    @property
    def is_unsaid(self) -> bool:
        """Whether the rank did not say it itself."""
        return self.text.startswith((DIED, SILENT))


@dataclass(frozen=True)
class Signs:
    """The signs of life that ranks give."""

    where: Callable[[], str] = str
    """Says what this rank is doing, to be named if it is lost."""

    patience: float | None = 120.0
    """Seconds without a sign after which a rank counts as lost; None waits for ever."""


class Watch:
    """This rank's end of the connection; call ``close`` if the job ends well, ``fail`` if not."""

    def __init__(
        self,
        rank: int,
        addresses: Sequence[str],
        exchange: SumOverRanks,
        notify: Callable[[Failure], None],
        signs: Signs,
    ) -> None:
        """Connect to the first rank. All ranks make their watch at the same time.

        addresses: those of the first rank's node, to try in turn. notify: is called once after
        ``start``, from a thread, when another rank has failed, unless this one has failed or
        closed before; ``has_notified`` says whether it was.
        """
        self._rank, self._notify, self._signs = rank, notify, signs
        self._ended = threading.Event()
        self.has_notified = False
        self._first: Failure | None = None
        self._known, self._lock = threading.Event(), threading.Lock()
        self._is_over = False
        listener = socket.create_server(("", 0), backlog=4096) if rank == 0 else None
        port = listener.getsockname()[1] if listener else 0
        port, token, size = exchange([port, secrets.randbits(48) if rank == 0 else 0, 1])
        if listener:
            self._peer, inside = socket.socketpair()
            hub = Hub(listener, inside, token, size, signs.patience)
            threading.Thread(target=hub.run, daemon=True).start()
        else:
            self._peer = connect(addresses, port)
        send(self._peer, rank, str(token))
        self._lines = Lines(self._peer)
        self._lines.next()  # The first rank's answer: from now on it hears this rank, and tells it.
        exchange([0])  # That is true of all ranks now.

    def start(self) -> None:
        """Give signs of life, and listen: from now on ``notify`` may be called."""
        if self._signs.patience is not None:
            seconds = self._signs.patience / LOOKS
            threading.Thread(target=self._give_signs, args=(seconds,), daemon=True).start()
            self._peer.settimeout(seconds)
        threading.Thread(target=self._listen, args=(self._lines,), daemon=True).start()

    def fail(self, text: str, *, is_doubtful: bool = False) -> Failure:
        """Tell the others that this rank failed; return the first failure, maybe another rank's.

        is_doubtful: the error may only follow from another rank's, so wait for that one first.
        """
        self._be_over()
        if is_doubtful and self._known.wait(_TRUST_SECONDS):
            assert self._first is not None
            return self._first
        if send(self._peer, self._rank, text):
            self._known.wait(_TRUST_SECONDS)
        return self._first or Failure(self._rank, text)

    def close(self) -> None:
        """Leave in order: the others do not take it for a failure."""
        self._be_over()
        send(self._peer, self._rank, None)

    def _be_over(self) -> None:
        with self._lock:
            self._is_over = True
        self._ended.set()

    def _give_signs(self, every: float) -> None:
        while not self._ended.wait(every):
            send(self._peer, self._rank, f"{ALIVE}{self._place()}")

    def _place(self) -> str:
        try:
            return self._signs.where()
        except Exception as error:  # noqa: BLE001 (it is the user's, and may raise anything)
            # Without signs the rank would be taken for lost.
            return f"a place that cannot be told ({type(error).__name__}: {error})"

    def _listen(self, lines: Lines) -> None:
        """Wait until the first rank sends a failure, leaves, is gone, or is silent."""
        failure = self._next_failure(lines)
        if failure is None:
            return
        with self._lock:
            self._first = failure
            self.has_notified = not self._is_over
        self._known.set()
        if self.has_notified:
            self._notify(failure)

    def _next_failure(self, lines: Lines) -> Failure | None:
        """Return the first failure; None if the first rank leaves in order."""
        num_silent = 0
        while num_silent < LOOKS:
            try:
                message = lines.next()
            except TimeoutError:
                num_silent += 1
                continue
            if message is None:
                return Failure(0, DIED)
            if message[1] is None:
                return None
            if not message[1].startswith(ALIVE):
                return Failure(message[0], message[1])
            num_silent = 0
        return Failure(0, silent(self._signs.patience))
