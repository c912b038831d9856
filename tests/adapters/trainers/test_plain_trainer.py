"""transformers.Trainer without DeepSpeed: in one process, and on two gloo ranks."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from regate_ds import Keyed
from regate_ds.adapters.trainers.hf_trainer import RegateTrainer
from tests.adapters.deepspeed.zero_checks_helper import run_named
from tests.adapters.huggingface.test_joined_rows import flattened, padded, stored, text_items
from tests.adapters.trainers.plain_trainer_helper import (
    CASES,
    OF_RANKS,
    RUNS,
    Gradient,
    OnFsdp1,
    Sharded,
    check_gradient_of_one,
    refused,
    settings,
)
from tests.support.measure import Gradients, assert_gradients_equal
from tests.support.models import causal_lm
from tests.support.planning import config_of
from tests.support.ranks import Failures, failures_of


@pytest.mark.parametrize("name", CASES)
def test_in_one_process_the_gradient_is_that_of_the_joint_batch(name: str, tmp_path: Path):
    check_gradient_of_one(CASES[name], tmp_path)


@pytest.mark.parametrize("name", RUNS)
def test_in_one_process_off_is_trainers_own_and_a_resumed_run_the_run(name: str, tmp_path: Path):
    RUNS[name](0, tmp_path)


def joined_step(folder: Path, collate: Any) -> tuple[Gradients, RegateTrainer]:
    data, kept = Keyed(text_items(), "mine"), Gradient()
    trainer = RegateTrainer(
        model=causal_lm(),
        args=settings(folder, max_steps=1, per_device_train_batch_size=4, max_grad_norm=0.0),
        train_dataset=data,
        data_collator=collate,
        callbacks=[kept],
        regate=config_of(warmup=0, final_dense_share=0.0),
        reference=stored(data),
    )
    trainer.train()
    assert not trainer.regate.metrics()["dense"]
    return kept.found, trainer


def test_a_collate_function_that_flattens_gives_trainers_step_of_padded_rows(tmp_path: Path):
    """The host's own collate function, without padding."""
    found, trainer = joined_step(tmp_path, flattened(return_flash_attn_kwargs=True))
    wanted, plain = joined_step(tmp_path, padded)
    assert_gradients_equal(found, wanted, 1e-5)
    (joined,), (rows,) = trainer.regate.plan.micro, plain.regate.plan.micro
    assert (len(joined.kept_BK), len(rows.kept_BK)) == (1, 4)
    assert trainer.regate.metrics()["tokens_kept"] == plain.regate.metrics()["tokens_kept"]


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
