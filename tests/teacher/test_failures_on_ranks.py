"""A teacher's job that loses a rank, its folder or its disk: one line, no rank left waiting, and
nothing that was finished is computed again."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from regate_ds.stores.reference.reader import ReferenceStore
from regate_ds.teacher.precompute import precompute
from tests.teacher.plain_job_helper import make_plain_job
from tests.teacher.ranks_helper import GRACE_SECONDS, Ranks, Run, start
from tests.teacher.reference_job_helper import files_of

pytestmark = pytest.mark.slow

BOUND = GRACE_SECONDS + 20.0
"""Seconds that ranks may take to end, on a machine that is busy otherwise."""

SLOW = 0.15


@pytest.fixture
def whole(tmp_path) -> dict[str, bytes]:
    """The files of a job that nothing happened to."""
    precompute(make_plain_job(tmp_path / "whole", Run(tmp_path).num_samples))
    return files_of(tmp_path / "whole")


def wait_for_shards(store: Path, number: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(store.glob("shard-*"))) < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def shards_in(store: Path) -> dict[str, bytes]:
    return {name: x for name, x in files_of(store).items() if name.startswith("shard")}


def require_one_line(ranks: Ranks, *expected: str) -> None:
    lines = ranks.errors()
    assert len(lines) == 1, ranks.said()
    for text in expected:
        assert text in lines[0]


def require_same_end(store: Path, whole: dict[str, bytes], size: int) -> None:
    ranks = start(Run(store), size)
    assert ranks.wait(60) == [0] * size, ranks.said()
    assert files_of(store) == whole


@pytest.mark.parametrize("dead", [0, 2])
def test_a_rank_that_is_killed_is_named_and_the_others_end(tmp_path, whole, dead):
    store = tmp_path / "store"
    # Rank 1 hears of nothing: it is ended by force.
    ranks = start(Run(store, seconds_per_batch=SLOW, stuck_rank=1), 3)
    wait_for_shards(store, 3)
    ranks.processes[dead].kill()
    codes = ranks.wait(BOUND)
    assert codes[dead] == -9
    assert [code for rank, code in enumerate(codes) if rank != dead] == [1, 1]
    require_one_line(ranks, f"regate teacher: rank {dead}: has ended without a word: killed")
    finished = shards_in(store)
    require_same_end(store, whole, 2)
    assert finished.items() <= shards_in(store).items()


def test_a_folder_that_vanishes_ends_all_ranks(tmp_path):
    store = tmp_path / "store"
    ranks = start(Run(store, seconds_per_batch=SLOW), 2)
    wait_for_shards(store, 2)
    store.rename(tmp_path / "elsewhere")
    assert ranks.wait(BOUND) == [1, 1]
    require_one_line(ranks, "rank ", f"the reference store {store} has vanished")
    assert not store.exists()


def test_a_file_that_cannot_be_written_whole_ends_all_ranks(tmp_path, whole):
    store = tmp_path / "store"
    limit = max(len(content) for content in shards_in(tmp_path / "whole").values()) - 1
    ranks = start(Run(store, seconds_per_batch=SLOW), 1)
    wait_for_shards(store, 3)
    ranks.kill()
    for path in [*store.glob("shard-*")][3:]:
        path.unlink()
    finished = shards_in(store)
    ranks = start(Run(store, largest_file=limit), 2)
    assert ranks.wait(BOUND) == [1, 1]
    require_one_line(ranks, "rank ", "File too large", f"{store}/shard-")
    assert finished.items() <= shards_in(store).items()
    require_same_end(store, whole, 3)


def test_a_rank_with_another_teacher_ends_all_before_any_writes(tmp_path):
    store = tmp_path / "store"
    ranks = start(Run(store, other_rank=1), 3)
    assert ranks.wait(BOUND) == [1, 1, 1]
    require_one_line(ranks, "rank ", "fingerprint", "other ranks have not")
    assert not store.exists()


def test_what_only_the_first_rank_does_is_told_as_it_failed(tmp_path):
    store = tmp_path / "store"
    ranks = start(Run(store, largest_file=20), 3)
    assert ranks.wait(BOUND) == [1, 1, 1]
    require_one_line(ranks, "rank ", "File too large", f"{store}/index-")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of a few kilobytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("making a file system needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_ends_all_ranks_and_with_room_the_job_goes_on(small_disk, whole):
    store = small_disk / "store"
    # Room for the plan and a few shards; each file takes whole pages.
    (small_disk / "other").write_bytes(bytes(4096 * 7))
    ranks = start(Run(store), 2)
    assert ranks.wait(BOUND) == [1, 1]
    require_one_line(ranks, "rank ", "No space left on device", f"{store}/")
    finished = shards_in(store)
    (small_disk / "other").unlink()
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    require_same_end(store, whole, 2)
    assert len(finished) > 0
    assert finished.items() <= shards_in(store).items()


def test_kills_at_any_moment_leave_the_files_of_a_job_that_was_never_killed(tmp_path, whole):
    store, chance = tmp_path / "store", random.Random(time.time_ns())
    for size in (2, 1, 3, 2):
        ranks = start(Run(store, seconds_per_batch=0.01), size)
        time.sleep(chance.uniform(0.0, 0.6))
        ranks.kill()
    require_same_end(store, whole, 2)
    ReferenceStore(store, verify="full")
    shutil.rmtree(store)
