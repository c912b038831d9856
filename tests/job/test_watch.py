"""Ranks that hear of each other's failure; here each is a thread."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from queue import Queue

import pytest

from regate_ds.job import hub, watch
from regate_ds.job.hub import DIED, SILENT, Hub
from regate_ds.job.watch import Failure, Signs, Watch


class Sum:
    """The exchange of several threads."""

    def __init__(self, size: int) -> None:
        self._barrier, self._given = threading.Barrier(size), []
        self._lock = threading.Lock()

    def __call__(self, values) -> list[int]:
        with self._lock:
            self._given.append(list(values))
        self._barrier.wait(60)
        total = [sum(column) for column in zip(*self._given)]
        if self._barrier.wait(60) == 0:
            self._given.clear()
        self._barrier.wait(60)
        return total


class Rank:
    def __init__(self, rank: int, exchange: Callable, patience: float | None = 60) -> None:
        self.heard: list[Failure] = []
        self.place = f"step {rank + 5}"
        self._told = threading.Event()
        signs = Signs(lambda: self.place, patience)
        self.watch = Watch(rank, ["127.0.0.1", "localhost"], exchange, self._hear, signs)
        self.watch.start()

    def _hear(self, failure: Failure) -> None:
        self.heard.append(failure)
        self._told.set()

    def wait(self) -> list[Failure]:
        assert self._told.wait(20)
        return self.heard

    def die(self) -> None:
        """As the system does it for a killed process."""
        self.watch._peer.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def ranks() -> list[Rank]:
    exchange = Sum(3)
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(lambda rank: Rank(rank, exchange), range(3)))


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_all_hear_what_has_failed_but_the_rank_that_failed(ranks, failing):
    expected = Failure(failing, "no space left\non the disk")
    assert ranks[failing].watch.fail(expected.text) == expected
    for other in (rank for rank in ranks if rank is not ranks[failing]):
        assert other.wait() == [expected]
    assert ranks[failing].heard == []


def test_a_first_rank_that_is_slow_to_listen_loses_no_message(monkeypatch):
    add = Hub._add
    monkeypatch.setattr(Hub, "_add", lambda *args: time.sleep(0.2) or add(*args))
    exchange = Sum(3)
    with ThreadPoolExecutor(3) as pool:
        ranks = list(pool.map(lambda rank: Rank(rank, exchange), range(3)))
    ranks[2].watch.fail("no space left")
    assert ranks[0].wait() == ranks[1].wait() == [Failure(2, "no space left")]


def test_the_first_rank_is_told_last_because_it_may_end_at_once(ranks, monkeypatch):
    told, send = [], hub.send
    monkeypatch.setattr(hub, "send", lambda to, *what: told.append(to) or send(to, *what))
    ranks[2].watch.fail("no space left")
    assert ranks[0].wait() == ranks[1].wait() == [Failure(2, "no space left")]
    # Only the first rank's own connection does not leave its process.
    assert [to.family == socket.AF_UNIX for to in told] == [False, False, True]


@pytest.mark.parametrize("dead", [1, 2])
def test_all_hear_of_a_rank_that_died(ranks, dead):
    ranks[dead].die()
    for other in (rank for rank in ranks if rank is not ranks[dead]):
        assert other.wait() == [Failure(dead, DIED)]


def ranks_with(patience: float) -> list[Rank]:
    exchange = Sum(3)
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(lambda rank: Rank(rank, exchange, patience), range(3)))


@pytest.mark.parametrize("stopped", [1, 2])
def test_a_rank_that_gives_no_signs_is_named_with_what_it_did_last(stopped):
    ranks = ranks_with(1.0)
    time.sleep(1.0)
    # As if it were stopped: its connection stays.
    ranks[stopped].watch._ended.set()
    for other in (rank for rank in ranks if rank is not ranks[stopped]):
        (failure,) = other.wait()
        assert failure.rank == stopped
        assert failure.is_unsaid
        assert failure.text.startswith(f"{SILENT}1 s: it is stopped, or its machine hangs.")
        assert failure.text.endswith(f"(it was last in step {stopped + 5})")


def test_a_first_rank_that_answers_no_signs_is_named(monkeypatch):
    ranks = ranks_with(1.0)
    monkeypatch.setattr(hub, "send", lambda *_: True)
    monkeypatch.setattr(Hub, "_misses_one", lambda _: False)
    for other in ranks[1:]:
        (failure,) = other.wait()
        assert failure.rank == 0
        assert failure.text.startswith(SILENT)


def test_ranks_that_give_signs_are_not_lost():
    ranks = ranks_with(0.4)
    time.sleep(1.5)
    assert [rank.heard for rank in ranks] == [[], [], []]
    assert ranks[2].watch.fail("mine").text == "mine"
    assert ranks[1].wait() == [Failure(2, "mine")]


def test_a_rank_whose_place_cannot_be_told_is_not_lost():
    ranks = ranks_with(0.4)
    del ranks[1].place
    time.sleep(1.5)
    assert [rank.heard for rank in ranks] == [[], [], []]
    ranks[1].watch._ended.set()
    ranks[1].die()
    (failure,) = ranks[0].wait()
    assert "(it was last in a place that cannot be told (AttributeError: " in failure.text


def test_a_rank_that_dies_is_named_with_what_it_did_last():
    ranks = ranks_with(1.0)
    time.sleep(1.0)
    ranks[1].watch._ended.set()
    ranks[1].die()
    assert ranks[0].wait() == [Failure(1, f"{DIED} (it was last in step 6)")]


def test_what_failed_first_is_what_every_rank_names(ranks):
    ranks[2].watch.fail("first")
    assert ranks[1].watch.fail("connection closed by peer").text == "first"
    assert ranks[0].watch.fail("another") == Failure(2, "first")


def test_an_echo_waits_for_the_cause(ranks):
    cause = threading.Timer(0.3, ranks[1].die)
    cause.start()
    assert ranks[2].watch.fail("connection closed", is_doubtful=True) == Failure(1, DIED)
    cause.join()


def test_ranks_that_leave_are_not_missed(ranks):
    ranks[1].watch.close()
    ranks[1].die()
    ranks[2].die()
    assert ranks[0].wait() == [Failure(2, DIED)]
    assert ranks[1].heard == []


def test_a_job_that_ends_well_is_quiet(ranks):
    for rank in (1, 0, 2):
        ranks[rank].watch.close()
    assert ranks[2].watch._known.wait(0.2) is False
    assert [rank.heard for rank in ranks] == [[], [], []]


def test_a_first_rank_that_cannot_be_reached_is_named():
    def exchange(values) -> list[int]:
        # Nobody listens there.
        return [1, 2, 2]

    with pytest.raises(RuntimeError, match=r"reached at 127.0.0.1 or localhost, port 1; set MAS"):
        Rank(1, exchange)


class Door:
    """Holds the ranks that would connect to the first one, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._port, self.is_open, self._connect = Queue(), threading.Event(), watch.connect
        monkeypatch.setattr(watch, "connect", self._wait)

    def _wait(self, addresses, port: int) -> socket.socket:
        self._port.put(port)
        assert self.is_open.wait(60)
        return self._connect(addresses, port)

    def port(self) -> int:
        port = self._port.get(timeout=60)
        self._port.put(port)
        return port


@pytest.fixture
def door(monkeypatch) -> Door:
    return Door(monkeypatch)


def check_they_hear_each_other(ranks: Iterable[Rank]) -> None:
    first, second = ranks
    assert second.watch.fail("mine").text == "mine"
    assert first.wait() == [Failure(1, "mine")]


@pytest.mark.parametrize(
    "said",
    [b'[1, "wrong"]\n', b"hello\n", b"7\n", b"", b"[" * 100_000 + b"\n", b"\0" * 10_000_000],
    ids=lambda said: f"{said[:12]!r}, {len(said)} bytes",
)
def test_a_stranger_on_the_port_is_sent_away(door, said):
    exchange = Sum(2)
    with ThreadPoolExecutor(2) as pool:
        ranks = pool.map(lambda rank: Rank(rank, exchange), range(2))
        stranger = socket.create_connection(("127.0.0.1", door.port()), timeout=20)
        with stranger, suppress(ConnectionError):  # as it is sent away while it still talks
            stranger.sendall(said)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
        door.is_open.set()
        check_they_hear_each_other(ranks)


def test_strangers_that_say_nothing_or_never_end_are_not_waited_for(door, monkeypatch):
    monkeypatch.setattr(hub, "_STRANGER_SECONDS", 1.0)
    exchange = Sum(2)
    with ThreadPoolExecutor(2) as pool, ExitStack() as stack:
        ranks = pool.map(lambda rank: Rank(rank, exchange), range(2))
        address = ("127.0.0.1", door.port())
        strangers = [stack.enter_context(socket.create_connection(address)) for _ in range(200)]
        for stranger in strangers[::2]:
            stranger.sendall(b"[1, ")
        for stranger in strangers[:4]:
            stranger.settimeout(20)
            with suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
        door.is_open.set()
        check_they_hear_each_other(ranks)


def test_nobody_can_connect_once_all_ranks_are_there(door):
    exchange = Sum(2)
    door.is_open.set()
    with ThreadPoolExecutor(2) as pool:
        ranks = list(pool.map(lambda rank: Rank(rank, exchange), range(2)))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", door.port()), timeout=4)
    check_they_hear_each_other(ranks)


def test_ranks_that_wait_for_the_last_one_are_not_lost(door):
    exchange = Sum(3)
    with ThreadPoolExecutor(3) as pool:
        ranks = pool.map(lambda rank: Rank(rank, exchange, 0.4), range(3))
        door.port()
        time.sleep(1.5)
        door.is_open.set()
        found = list(ranks)
    assert [rank.heard for rank in found] == [[], [], []]
    check_they_hear_each_other(found[:2])
