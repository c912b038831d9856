"""Ranks that learn at once when one of them fails or dies, whatever they are waiting for.

Each rank holds a connection to the first one as long as it lives. A rank that fails says so over
it; of one that is killed the system closes the connection, and of one whose machine is gone it
finds that out by keep-alive probes. The first rank tells all others what it heard first.

One line of JSON each way: ``[rank, text]``, with ``null`` as the text of a rank that says goodbye.
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
"""What is said of a rank that could not say it itself."""

_TRUST_SECONDS = 5.0
"""How long a rank that fails waits to hear whether another one failed before."""

_PROBES = (
    (socket.TCP_KEEPIDLE, 10),
    (socket.TCP_KEEPINTVL, 5),
    (socket.TCP_KEEPCNT, 4),
)
"""A machine that does not answer is given up after half a minute."""

SumOverRanks = Callable[[Sequence[int]], list[int]]
"""Sums integers over all ranks."""


@dataclass(frozen=True)
class Failure:
    """What ended the job: the same on every rank."""

    rank: int
    text: str

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.text}"


class Watch:
    """This rank's part; ``close`` it where the job ends well, ``fail`` it where it does not."""

    def __init__(
        self,
        rank: int,
        addresses: Sequence[str],
        exchange: SumOverRanks,
        notify: Callable[[Failure], None],
    ) -> None:
        """Every rank makes one at the same time.

        addresses: of the first rank's machine, to be tried in turn. notify: called once, from a
        thread, when another rank has failed; not if this one has failed or closed before.
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
        exchange([0])  # All are connected.
        threading.Thread(target=self._listen, daemon=True).start()

    def fail(self, text: str, *, is_doubtful: bool = False) -> Failure:
        """Tell the others that this rank has failed; return what failed first, maybe another rank.

        is_doubtful: the error may be but the echo of another's, so give that one time to be heard.
        """
        with self._lock:
            self._is_over = True
        if is_doubtful and self._known.wait(_TRUST_SECONDS):
            assert self._first is not None
            return self._first
        own = Failure(self._rank, text)
        if _send(self._peer, self._rank, text):
            self._known.wait(_TRUST_SECONDS)
        return self._first or own

    def close(self) -> None:
        """Leave; the others do not miss this rank."""
        with self._lock:
            self._is_over = True
        _send(self._peer, self._rank, None)

    def _listen(self) -> None:
        """Wait for the first rank to say what has failed, or to be gone."""
        said = _Lines(self._peer).next()
        if said is not None and said[1] is None:
            return
        failure = Failure(0, DIED) if said is None else Failure(said[0], said[1] or "")
        with self._lock:
            self._first = failure
            is_news = not self._is_over
        self._known.set()
        if is_news:
            self._notify(failure)


class _Hub:
    """The first rank's: hears all ranks, itself included, and passes the first failure on."""

    def __init__(self, listener: socket.socket, own: socket.socket, token: int) -> None:
        self._listener, self._token = listener, str(token)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._ranks: dict[socket.socket, int] = {}
        self._lines: dict[socket.socket, _Lines] = {}
        self._add(own)

    def run(self) -> None:
        """Until the first rank itself leaves; its end is the end of the process's threads."""
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
        # Of a stranger that never ends its line.
        connection.settimeout(5)
        self._lines[connection] = _Lines(connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _hear(self, connection: socket.socket) -> bool:
        """True if there is nothing more to do."""
        said = self._lines[connection].next()
        if connection not in self._ranks:
            return self._welcome(connection, said)
        rank = self._ranks[connection]
        if said is not None and said[1] is None:
            self._drop(connection)
            if rank == 0:
                self._tell(0, None)
            return rank == 0
        self._tell(rank, DIED if said is None else said[1])
        return True

    def _welcome(self, connection: socket.socket, said: tuple[int, str | None] | None) -> bool:
        """A rank of this job knows the token; a stranger on the port does not."""
        if said is None or said[1] != self._token:
            self._drop(connection)
            connection.close()
        else:
            self._ranks[connection] = said[0]
        return False

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._ranks.pop(connection, None)
        del self._lines[connection]

    def _tell(self, rank: int, text: str | None) -> None:
        # The first rank last: it may end at once, and its end would be taken for the failure.
        for connection in sorted(self._ranks, key=self._ranks.__getitem__, reverse=True):
            _send(connection, rank, text)


class _Lines:
    """The messages that come over a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._rest = connection, b""

    def next(self) -> tuple[int, str | None] | None:
        """The next message; None if the other end is gone."""
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
            # Of a stranger: not JSON, or not a pair.
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
        "MASTER_ADDR to an address of its machine, and let ranks reach each other at any port"
    )


def _send(connection: socket.socket, rank: int, text: str | None) -> bool:
    """False if the other end is gone."""
    try:
        connection.sendall(json.dumps([rank, text]).encode() + b"\n")
    except OSError:
        return False
    return True


def _probe(connection: socket.socket) -> None:
    """Find out in time that the other machine is gone."""
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _PROBES:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
