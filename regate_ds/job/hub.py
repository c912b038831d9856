"""The first rank's hub: it listens to all ranks, itself included, and sends on a failure.

Until all ranks have come, strangers may connect as well. None of them is waited for: what they send
is read as it comes, up to a line's length, and they are sent away after some seconds. Then nobody
can connect any more.
"""

from __future__ import annotations

import selectors
import socket
import time

from regate_ds.job.connection import Lines, Message, probe, send

DIED = (
    "has ended without a word: killed, out of memory, or its machine is gone. What is finished "
    "stays; start the job again to go on"
)
"""Start of the failure of a rank that sent no message itself."""

SILENT = "has given no sign of life for "
"""Start of the failure of a rank that is stopped, or that hangs."""

LOOKS = 8
"""Looks for a sign of life until a rank is lost. They are counted, not the time: a job that was
suspended as a whole, this rank with it, may go on."""

ALIVE = "\0"
"""Start of a sign of life; what the rank is doing follows."""

_LONGEST = 256
"""Bytes of the line with which a rank of this job comes, at most."""

_STRANGER_SECONDS = 5.0
"""Seconds in which it must have come."""


class Hub:
    """The first rank's hub: it listens to all ranks, itself included, and sends on a failure."""

    def __init__(
        self,
        listener: socket.socket,
        inside: socket.socket,
        token: int,
        num_ranks: int,
        patience: float | None,
    ) -> None:
        self._listener, self._token, self._patience = listener, str(token), patience
        self._num_missing = num_ranks
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._ranks: dict[socket.socket, int] = {}
        self._places: dict[int, str] = {}
        self._num_silent: dict[int, int] = {}
        self._lines: dict[socket.socket, Lines] = {}
        self._strangers: dict[socket.socket, float] = {}
        self._add(inside)

    def run(self) -> None:
        """Serve until a failure is sent on or the first rank leaves; the thread ends with it."""
        every = None if self._patience is None else self._patience / LOOKS
        next_look = time.monotonic() + (every or 0.0)
        while True:
            wait = None if every is None else max(0.0, next_look - time.monotonic())
            if self._strangers:
                wait = 1.0 if wait is None else min(1.0, wait)
            for key, _ in self._selector.select(wait):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if connection is self._listener:
                    self._accept()
                elif connection in self._lines and self._hear(connection):
                    return
            self._send_strangers_away()
            if every is not None and time.monotonic() >= next_look:
                next_look = time.monotonic() + every
                if self._misses_one():
                    return

    def _accept(self) -> None:
        try:
            self._add(self._listener.accept()[0])
        except OSError:
            # So many strangers that there are no handles left: some of them are sent away soon.
            time.sleep(0.1)

    def _send_strangers_away(self) -> None:
        late = time.monotonic() - _STRANGER_SECONDS
        for stranger in [one for one, since in self._strangers.items() if since < late]:
            self._send_away(stranger)

    def _send_away(self, stranger: socket.socket) -> None:
        self._forget(stranger)
        stranger.close()

    def _misses_one(self) -> bool:
        """Count a look; return whether a rank was silent too often, which is sent on."""
        if self._num_missing:
            return False  # ranks give signs once all have come
        for rank in self._ranks.values():
            self._num_silent[rank] = self._num_silent.get(rank, 0) + 1
        lost = [rank for rank in self._ranks.values() if self._num_silent[rank] > LOOKS]
        if lost:
            self._tell(min(lost), silent(self._patience) + self._place(min(lost)))
        return bool(lost)

    def _place(self, rank: int) -> str:
        place = self._places.get(rank)
        return f" (it was last in {place})" if place else ""

    def _add(self, connection: socket.socket) -> None:
        probe(connection)
        # What is sent is small: a connection that does not take it in this time is lost.
        connection.settimeout(_STRANGER_SECONDS)
        self._lines[connection] = Lines(connection)
        self._strangers[connection] = time.monotonic()
        self._selector.register(connection, selectors.EVENT_READ)

    def _hear(self, connection: socket.socket) -> bool:
        """Read what has come; return whether the hub has nothing more to do."""
        lines = self._lines[connection]
        is_open = lines.read()
        while lines.has_message:
            if self._take(connection, lines.take()):
                return True
            if connection not in self._lines:
                return False
        is_too_long = connection in self._strangers and lines.num_bytes > _LONGEST
        if is_open and not is_too_long:
            return False
        return self._take(connection, None)

    def _take(self, connection: socket.socket, message: Message | None) -> bool:
        """Act on a message; return whether the hub has nothing more to do."""
        if connection not in self._ranks:
            return self._welcome(connection, message)
        rank = self._ranks[connection]
        if message is None:
            self._tell(rank, DIED + self._place(rank))
            return True
        if message[1] is None:
            self._forget(connection)
            if rank == 0:
                self._tell(0, None)
            return rank == 0
        if message[1].startswith(ALIVE):
            self._places[rank], self._num_silent[rank] = message[1].removeprefix(ALIVE), 0
            send(connection, 0, ALIVE)
            return False
        self._tell(rank, message[1])
        return True

    def _welcome(self, connection: socket.socket, message: Message | None) -> bool:
        """Accept a rank of this job, which knows the token; send a stranger away."""
        if message is None or message[1] != self._token:
            self._send_away(connection)
            return False
        del self._strangers[connection]
        self._ranks[connection] = message[0]
        send(connection, message[0], None)
        self._num_missing -= 1
        if self._num_missing == 0:
            self._selector.unregister(self._listener)
            self._listener.close()
        return False

    def _forget(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._ranks.pop(connection, None)
        self._strangers.pop(connection, None)
        del self._lines[connection]

    def _tell(self, rank: int, text: str | None) -> None:
        # The first rank is told last: it may end at once, which others would take for the failure.
        for connection in sorted(self._ranks, key=self._ranks.__getitem__, reverse=True):
            send(connection, rank, text)


def silent(patience: float | None) -> str:
    """Say that a rank is lost which is still connected."""
    assert patience is not None
    return (
        f"{SILENT}{patience:g} s: it is stopped, or its machine hangs. What is finished stays; "
        "start the job again to go on"
    )
