from datetime import timedelta

import deepspeed
import pytest

from regate_ds.training.process import require_launched, start_process

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_a_process_without_a_launcher_is_a_job_of_one(monkeypatch):
    require_launched()
    monkeypatch.setenv("SLURM_NTASKS", "1")
    require_launched()


def test_tasks_of_srun_that_know_of_no_ranks_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(ValueError, match="SLURM_NTASKS=4, but RANK is not set"):
        require_launched()


def test_tasks_of_srun_with_ranks_are_a_job(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "2")
    require_launched()


def test_a_rank_without_the_rest_of_the_job_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ValueError, match="RANK=1, but WORLD_SIZE, MASTER_ADDR not set"):
        require_launched()


@pytest.mark.parametrize(("asked", "minutes"), [(None, 360), ("7", 7)])
def test_ranks_wait_longer_for_each_other_than_deepspeed_does(monkeypatch, asked, minutes):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("DEEPSPEED_TIMEOUT", raising=False)
    if asked is not None:
        monkeypatch.setenv("DEEPSPEED_TIMEOUT", asked)
    given = {}
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **options: given.update(options))
    start_process()
    assert given["timeout"] == timedelta(minutes=minutes)
