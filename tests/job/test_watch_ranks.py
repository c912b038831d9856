"""``watch_ranks`` in a loop of one's own: one rank fails, is killed, or is stopped."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from regate_ds.job.errors import JobFailed
from regate_ds.job.hub import DIED, SILENT
from regate_ds.job.supervise import watch_ranks
from tests.support.paths import ROOT
from tests.support.ranks import PRELOADED, run_ranks

LOST = 1
FOR_EVER = 60.0
"""Seconds that a rank would wait for a lost one: more than a test takes."""


class BatchError(Exception):
    """An error of the user's own, which no module of ours knows."""


def leaves_in_order(rank: int) -> None:
    for _ in range(2):
        with watch_ranks():
            dist.barrier()
    with watch_ranks(timeout=None):
        dist.barrier()
    for code in (None, 0):
        with pytest.raises(SystemExit), watch_ranks():
            sys.exit(code)


def exits(rank: int) -> None:
    expected = SystemExit if rank == LOST else JobFailed
    with pytest.raises(expected) as raised, watch_ranks():
        _wait_or_exit(rank)
    assert str(raised.value) == ("3" if rank == LOST else f"rank {LOST}: exit code 3")


def _wait_or_exit(rank: int) -> None:
    if rank == LOST:
        sys.exit(3)
    time.sleep(FOR_EVER)


@contextmanager
def watched_twice() -> Iterator[None]:
    with watch_ranks(), watch_ranks():
        yield


def fails(rank: int, watch: Callable[[], AbstractContextManager[None]] = watch_ranks) -> None:
    own = BatchError if rank == LOST else JobFailed
    began = time.monotonic()
    with pytest.raises(own, match="a bad\\s*batch") as raised, watch():
        _wait_or_fail(rank)
    assert time.monotonic() - began < FOR_EVER
    expected = "a bad\nbatch" if rank == LOST else f"rank {LOST}: a bad batch"
    assert str(raised.value) == expected


def _wait_or_fail(rank: int) -> None:
    if rank == LOST:
        raise BatchError("a bad\nbatch")
    time.sleep(FOR_EVER)


def fails_in_two(rank: int) -> None:
    fails(rank, watched_twice)


def fails_where_interrupts_are_ignored(rank: int) -> None:
    """As in a job that a shell has put into the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fails(rank)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def fails_where_interrupts_end_a_process(rank: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fails(rank)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


@pytest.mark.parametrize(
    "check",
    [
        leaves_in_order,
        fails,
        fails_where_interrupts_are_ignored,
        fails_where_interrupts_end_a_process,
        fails_in_two,
        exits,
    ],
)
def test_a_loop_ends_with_its_ranks(check):
    run_ranks(check, 3)


def is_lost(rank: int, how: int, folder: Path) -> None:
    os.environ.pop("MASTER_ADDR", None)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/joined{how}", rank=rank, world_size=3
    )

    def train() -> None:
        dist.barrier()
        time.sleep(1.5)
        if rank == LOST:
            os.kill(os.getpid(), how)
        time.sleep(FOR_EVER)

    try:
        exec(lines_of_the_page(), {"train": train, "step": 7})
    except JobFailed as failure:
        (folder / f"{rank}").write_text(str(failure))


def lines_of_the_page() -> str:
    """Return what docs/loops.md shows, with less patience."""
    page = (ROOT / "docs" / "loops.md").read_text()
    (block,) = re.findall(
        r"```python\n(from regate_ds import watch_ranks\n.*?)```", page, re.DOTALL
    )
    assert "timeout=120," in block
    return block.replace("timeout=120,", "timeout=2,")


def hears_an_echo(rank: int, lost: int, folder: Path) -> None:
    """Every rank but the lost one has an error of its own before the news of that one."""
    os.environ.pop("MASTER_ADDR", None)
    dist.init_process_group("gloo", init_method=f"file://{folder}/joined", rank=rank, world_size=3)
    sys.stderr = (folder / f"{rank}").open("w")
    with watch_ranks():
        dist.barrier()
        if rank == lost:
            time.sleep(1.5)
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("gloo: Connection closed by peer")


@pytest.mark.parametrize("lost", [0, 2])
def test_a_lost_rank_is_named_once_where_its_echo_is_faster(lost, tmp_path):
    run_until_all_end(hears_an_echo, (lost, tmp_path))
    said = [(tmp_path / f"{rank}").read_text() for rank in range(3) if rank != lost]
    lines = [line for text in said for line in text.splitlines() if line.startswith("regate loop")]
    assert len(lines) == 1
    assert lines[0].startswith(f"regate loop: rank {lost}: {DIED}")


def run_until_all_end(target: Callable[..., None], args: tuple[object, ...]) -> None:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ranks = [context.Process(target=target, args=(rank, *args)) for rank in range(3)]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(FOR_EVER)
            assert process.exitcode
    finally:
        for process in ranks:
            process.kill()
            process.join()


@pytest.mark.parametrize(("how", "said"), [(signal.SIGKILL, DIED), (signal.SIGSTOP, SILENT)])
def test_a_lost_rank_is_named_with_what_it_was_doing(how, said, tmp_path):
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ranks = [context.Process(target=is_lost, args=(r, how, tmp_path)) for r in range(3)]
    for process in ranks:
        process.start()
    try:
        for process in (ranks[0], ranks[2]):
            process.join(FOR_EVER)
            assert process.exitcode is not None
    finally:
        for process in ranks:
            process.kill()
            process.join()
    for rank in (0, 2):
        text = (tmp_path / f"{rank}").read_text()
        assert text.startswith(f"rank {LOST}: {said}")
        assert text.endswith("(it was last in step 7)")


def test_one_process_needs_no_watch():
    with pytest.raises(BatchError), watch_ranks():
        raise BatchError


def test_what_cannot_be_watched_is_refused(monkeypatch):
    told = r"^watch_ranks\(timeout=0\): must be above 0 seconds"
    with pytest.raises(ValueError, match=told), watch_ranks(timeout=0):
        pass

    def enter() -> None:
        with watch_ranks():
            pass

    told = "but only the main thread can be interrupted"
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match=told):
        pool.submit(enter).result()
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = "^this job has 2 ranks, which have not joined: call"
    with pytest.raises(ValueError, match=told), watch_ranks():
        pass
