"""Tell all ranks at once when one of them fails or dies, whatever they are waiting for.

Each rank holds a connection to the first rank as long as it lives. A rank that fails sends a
message over it. If a rank is killed, the system closes the connection; if its node is gone,
keep-alive probes find that out. The first rank sends the first failure that it hears of to all.

A message is one line of JSON, ``[rank, text]``; a rank that leaves in order sends ``null`` as text.
A rank sends a token first, and says nothing more before it is answered.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import selectors
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

DIED = (
    "has ended without a word: killed, out of memory, or its machine is gone. What is finished "
    "stays; start the job again to go on"
)
"""Text of the failure of a rank that sent no message itself."""

_TRUST_SECONDS = 5.0
"""Seconds that a failing rank waits to hear whether another one failed before."""

_PROBES = (
    (socket.TCP_KEEPIDLE, 10),
    (socket.TCP_KEEPINTVL, 5),
    (socket.TCP_KEEPCNT, 4),
)
"""TCP options: a node that does not answer is given up after half a minute."""

SumOverRanks = Callable[[Sequence[int]], list[int]]
"""Sums integers over all ranks."""


@dataclass(frozen=True)
class Failure:
    """The failure that ended the job; it is the same on every rank."""

    rank: int
    text: str

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.text}"


class Watch:
    """This rank's end of the connection; call ``close`` if the job ends well, ``fail`` if not."""

    def __init__(
        self,
        rank: int,
        addresses: Sequence[str],
        exchange: SumOverRanks,
        notify: Callable[[Failure], None],
    ) -> None:
        """Connect to the first rank. All ranks make their watch at the same time.

        addresses: those of the first rank's node, to try in turn. notify: is called once, from a
        thread, when another rank has failed, unless this one has failed or closed before.
        """
        self._rank, self._notify = rank, notify
        self._first: Failure | None = None
        self._known, self._lock = threading.Event(), threading.Lock()
        self._is_over = False
        listener = socket.create_server(("", 0), backlog=4096) if rank == 0 else None
        port = listener.getsockname()[1] if listener else 0
        port, token = exchange([port, secrets.randbits(48) if rank == 0 else 0])
        if listener:
            self._peer, inside = socket.socketpair()
            hub = _Hub(listener, inside, token)
            threading.Thread(target=hub.run, daemon=True).start()
        else:
            self._peer = _connect(addresses, port)
        _send(self._peer, rank, str(token))
        lines = _Lines(self._peer)
        lines.next()  # The first rank's answer: from now on it hears this rank, and tells it.
        exchange([0])  # That is true of all ranks now.
        threading.Thread(target=self._listen, args=(lines,), daemon=True).start()

    def fail(self, text: str, *, is_doubtful: bool = False) -> Failure:
        """Tell the others that this rank failed; return the first failure, maybe another rank's.

        is_doubtful: the error may only follow from another rank's, so wait for that one first.
        """
        with self._lock:
            self._is_over = True
        if is_doubtful and self._known.wait(_TRUST_SECONDS):
            assert self._first is not None
            return self._first
        if _send(self._peer, self._rank, text):
            self._known.wait(_TRUST_SECONDS)
        return self._first or Failure(self._rank, text)

    def close(self) -> None:
        """Leave in order: the others do not take it for a failure."""
        with self._lock:
            self._is_over = True
        _send(self._peer, self._rank, None)

    def _listen(self, lines: _Lines) -> None:
        """Wait until the first rank sends a failure, leaves, or is gone."""
        message = lines.next()
        if message is not None and message[1] is None:
            return
        failure = Failure(0, DIED) if message is None else Failure(message[0], message[1] or "")
        with self._lock:
            self._first = failure
            is_news = not self._is_over
        self._known.set()
        if is_news:
            self._notify(failure)


class _Hub:
    """The first rank's hub: it listens to all ranks, itself included, and sends on a failure."""

    def __init__(self, listener: socket.socket, inside: socket.socket, token: int) -> None:
        self._listener, self._token = listener, str(token)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._ranks: dict[socket.socket, int] = {}
        self._lines: dict[socket.socket, _Lines] = {}
        self._add(inside)

    def run(self) -> None:
        """Serve until a failure is sent on or the first rank leaves; the thread ends with it."""
        while True:
            for key, _ in self._selector.select():
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if connection is self._listener:
                    self._add(self._listener.accept()[0])
                elif self._hear(connection):
                    return

    def _add(self, connection: socket.socket) -> None:
        _probe(connection)
        # A stranger may connect and never end its line.
        connection.settimeout(5)
        self._lines[connection] = _Lines(connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _hear(self, connection: socket.socket) -> bool:
        """Read one message; return whether the hub has nothing more to do."""
        message = self._lines[connection].next()
        if connection not in self._ranks:
            return self._welcome(connection, message)
        rank = self._ranks[connection]
        if message is not None and message[1] is None:
            self._forget(connection)
            if rank == 0:
                self._tell(0, None)
            return rank == 0
        self._tell(rank, DIED if message is None else message[1])
        return True

    def _welcome(self, connection: socket.socket, message: tuple[int, str | None] | None) -> bool:
        """Accept a rank of this job, which knows the token; close a stranger's connection."""
        if message is None or message[1] != self._token:
            self._forget(connection)
            connection.close()
        else:
            self._ranks[connection] = message[0]
            _send(connection, message[0], None)
        return False

    def _forget(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._ranks.pop(connection, None)
        del self._lines[connection]

    def _tell(self, rank: int, text: str | None) -> None:
        # The first rank is told last: it may end at once, which others would take for the failure.
        for connection in sorted(self._ranks, key=self._ranks.__getitem__, reverse=True):
            _send(connection, rank, text)


class _Lines:
    """The messages that come over a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._rest = connection, b""

    def next(self) -> tuple[int, str | None] | None:
        """Wait for the next message; return None if the other end is gone."""
        while b"\n" not in self._rest:
            try:
                chunk = self._connection.recv(65536)
            except OSError:
                return None
            if not chunk:
                return None
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            rank, text = json.loads(line)
        except (ValueError, TypeError):
            # A stranger's line: not JSON, or not a pair.
            return None
        return rank, text


def _connect(addresses: Sequence[str], port: int) -> socket.socket:
    for address in addresses:
        with contextlib.suppress(OSError):
            connection = socket.create_connection((address, port), timeout=20)
            connection.settimeout(None)
            _probe(connection)
            return connection
    raise RuntimeError(
        f"the first rank cannot be reached at {' or '.join(addresses)}, port {port}; set "
        "MASTER_ADDR to an address of its node, and let ranks reach each other at any port"
    )


def _send(connection: socket.socket, rank: int, text: str | None) -> bool:
    """Send a message; return False if the other end is gone."""
    try:
        connection.sendall(json.dumps([rank, text]).encode() + b"\n")
    except OSError:
        return False
    return True


def _probe(connection: socket.socket) -> None:
    """Set keep-alive probes, which find out that the other node is gone."""
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _PROBES:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
