"""transformers.Trainer without DeepSpeed: in one process, and on two gloo ranks."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path

import pytest

from tests.adapters.deepspeed.zero_checks_helper import run_named
from tests.adapters.trainers.plain_trainer_helper import (
    CASES,
    OF_RANKS,
    RUNS,
    OnFsdp1,
    Sharded,
    check_gradient_of_one,
    refused,
)
from tests.support.models import causal_lm
from tests.support.ranks import Failures, failures_of


@pytest.mark.parametrize("name", CASES)
def test_in_one_process_the_gradient_is_that_of_the_joint_batch(name: str, tmp_path: Path):
    check_gradient_of_one(CASES[name], tmp_path)


@pytest.mark.parametrize("name", RUNS)
def test_in_one_process_off_is_trainers_own_and_a_resumed_run_the_run(name: str, tmp_path: Path):
    RUNS[name](0, tmp_path)


def test_what_cannot_work_is_refused(tmp_path: Path):
    assert "2 GPUs in one process (DataParallel)" in refused(tmp_path, n_gpu=2)
    assert "FSDP1" in refused(tmp_path, OnFsdp1)
    assert "from_pretrained(distributed_config=...)" in refused(
        tmp_path, model=Sharded(causal_lm().config)
    )


def check_all(rank: int, folder: str) -> None:
    root = Path(folder)
    # Trainer collects garbage before it trains: 0.7 s among the objects of all that is imported.
    gc.freeze()
    run_named(rank, folder, {n: partial(c, rank, root / n) for n, c in OF_RANKS.items()})


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> Failures:
    return failures_of(check_all, 2, tmp_path_factory.mktemp("trainer"))


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_RANKS)
def test_two_ranks(name: str, failures: Failures):
    assert name not in failures, "\n".join(failures[name])
