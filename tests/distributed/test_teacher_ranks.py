"""Any number of ranks computes the same store, also one that another number began."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from regate_ds.teacher.precompute import precompute
from tests.distributed.ranks import run_ranks
from tests.unit.teacher.reference_job import files_of, make_job

pytestmark = pytest.mark.slow


def check_job_ends(rank: int, store: Path) -> None:
    precompute(make_job(store), dist.group.WORLD)
    assert "manifest.json" in files_of(store)


def check_job_breaks_off_on_every_rank(rank: int, store: Path) -> None:
    job, calls = make_job(store), []

    def fail_at_the_third(samples):
        calls.append(samples)
        if len(calls) == 3:
            raise RuntimeError("power cut")
        return job.score(samples)

    with pytest.raises(RuntimeError, match="power cut"):
        precompute(replace(job, score=fail_at_the_third), dist.group.WORLD)


def check_a_part_for_each(rank: int, store: Path) -> None:
    assert precompute(make_job(store), dist.group.WORLD).num_tokens > 0


def test_what_one_of_two_ranks_left_is_shared_by_both(tmp_path):
    precompute(make_job(tmp_path))
    for path in sorted(tmp_path.glob("shard-*"))[::2]:
        path.unlink()
    run_ranks(check_a_part_for_each, 2, tmp_path)


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_writes_the_same_files(tmp_path, world_size):
    precompute(make_job(tmp_path / "one"))
    run_ranks(check_job_ends, world_size, tmp_path / "many")
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")


def test_another_number_of_ranks_ends_what_two_began(tmp_path):
    precompute(make_job(tmp_path / "one"))
    run_ranks(check_job_breaks_off_on_every_rank, 2, tmp_path / "begun")
    shards = [name for name in files_of(tmp_path / "begun") if name.startswith("shard")]
    assert len(shards) == 4
    run_ranks(check_job_ends, 3, tmp_path / "begun")
    assert files_of(tmp_path / "begun") == files_of(tmp_path / "one")
