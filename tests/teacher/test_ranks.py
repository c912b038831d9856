"""Any number of ranks computes the same store, also one that another number began."""

from pathlib import Path

import pytest

from regate_ds.teacher.precompute import precompute
from tests.teacher.plain_job_helper import make_plain_job
from tests.teacher.ranks_helper import Run, start
from tests.teacher.reference_job_helper import files_of

pytestmark = pytest.mark.slow


@pytest.fixture
def alone(tmp_path) -> Path:
    """The store that one process computes."""
    precompute(make_plain_job(tmp_path / "alone", Run(tmp_path).num_samples))
    return tmp_path / "alone"


def num_shards(store: Path) -> int:
    return len(list(store.glob("shard-*")))


def run_job(run: Run, size: int) -> list[int]:
    """Batches that each rank scores."""
    assert run.counts is not None
    run.counts.mkdir()
    ranks = start(run, size)
    assert ranks.wait(60) == [0] * size, ranks.said()
    return [int((run.counts / str(rank)).read_text()) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_ranks_writes_the_same_files_in_equal_parts(tmp_path, alone, size):
    batches = run_job(Run(tmp_path / "many", counts=tmp_path / "counts"), size)
    assert files_of(tmp_path / "many") == files_of(alone)
    assert sum(batches) == num_shards(alone)
    assert max(batches) - min(batches) <= 2


def test_what_one_of_two_ranks_left_is_shared_by_both(tmp_path, alone):
    before = files_of(alone)
    for path in sorted(alone.glob("shard-*"))[::2]:
        path.unlink()
    first, second = run_job(Run(alone, counts=tmp_path / "counts"), 2)
    assert abs(first - second) <= 1
    assert files_of(alone) == before


def test_another_number_of_ranks_ends_what_two_began(tmp_path, alone):
    store = tmp_path / "begun"
    ranks = start(Run(store, fails_after=3), 2)
    assert ranks.wait(60) == [1, 1]
    assert len(ranks.errors()) == 1
    assert "the device is lost" in ranks.errors()[0]
    begun = num_shards(store)
    assert 3 <= begun <= 6
    assert sum(run_job(Run(store, counts=tmp_path / "counts"), 3)) == num_shards(alone) - begun
    assert files_of(store) == files_of(alone)


def test_ranks_of_one_replica_score_the_same_and_one_of_them_writes(tmp_path, alone):
    run = Run(tmp_path / "store", ranks_per_replica=2, counts=tmp_path / "counts")
    batches = run_job(run, 4)
    assert batches[0] == batches[1]
    assert batches[2] == batches[3]
    assert batches[0] + batches[2] == num_shards(alone)
    assert files_of(run.store) == files_of(alone)


def test_ranks_that_must_keep_in_step_score_equally_often(tmp_path, alone):
    run = Run(tmp_path / "store", in_step=True, counts=tmp_path / "counts")
    batches = run_job(run, 3)
    assert len(set(batches)) == 1
    assert sum(batches) >= num_shards(alone)
    assert files_of(run.store) == files_of(alone)
