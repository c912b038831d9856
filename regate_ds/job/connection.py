"""One rank's connection to the first rank: messages of a line each, and probes of the other node.

A message is one line of JSON, ``[rank, text]``.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Sequence

_PROBES = (
    (socket.TCP_KEEPIDLE, 10),
    (socket.TCP_KEEPINTVL, 5),
    (socket.TCP_KEEPCNT, 4),
)
"""TCP options: a node that does not answer is given up after half a minute."""

Message = tuple[int, str | None]


class Lines:
    """The messages that come over a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._rest = connection, b""

    @property
    def has_message(self) -> bool:
        """Whether a whole line has come that ``take`` has not returned yet."""
        return b"\n" in self._rest

    @property
    def num_bytes(self) -> int:
        """Bytes that have come, and were not taken."""
        return len(self._rest)

    def read(self) -> bool:
        """Wait until something comes; return False if the other end is gone.

        TimeoutError if the connection has a time, and nothing comes in it.
        """
        try:
            chunk = self._connection.recv(65536)
        except TimeoutError:
            raise
        except OSError:
            return False
        self._rest += chunk
        return bool(chunk)

    def take(self) -> Message | None:
        """Return the next message that has come; None if it is a stranger's."""
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            rank, text = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            # Not JSON, or not a pair.
            return None
        return rank, text

    def next(self) -> Message | None:
        """Wait for the next message; return None if the other end is gone.

        TimeoutError as for ``read``.
        """
        while not self.has_message:
            if not self.read():
                return None
        return self.take()


def connect(addresses: Sequence[str], port: int) -> socket.socket:
    """Connect to the first address that answers; RuntimeError if none does."""
    for address in addresses:
        with contextlib.suppress(OSError):
            connection = socket.create_connection((address, port), timeout=20)
            connection.settimeout(None)
            probe(connection)
            return connection
    raise RuntimeError(
        f"the first rank cannot be reached at {' or '.join(addresses)}, port {port}; set "
        "MASTER_ADDR to an address of its node, and let ranks reach each other at any port"
    )


def send(connection: socket.socket, rank: int, text: str | None) -> bool:
    """Send a message; return False if the other end is gone."""
    try:
        connection.sendall(json.dumps([rank, text]).encode() + b"\n")
    except OSError:
        return False
    return True


def probe(connection: socket.socket) -> None:
    """Set keep-alive probes, which find out that the other node is gone."""
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _PROBES:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
