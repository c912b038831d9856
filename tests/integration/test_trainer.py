"""transformers.Trainer and the examples of launch/, on two gloo ranks: see trainer_checks."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.ranks import run_ranks
from tests.integration.small_task import make_task
from tests.integration.trainer_checks import NUM_TRAIN, check_trainer


def test_trainer_and_the_examples_train_resume_and_can_be_switched_off(tmp_path: Path):
    make_task(tmp_path, num_train=NUM_TRAIN, num_test=1)
    run_ranks(check_trainer, 2, str(tmp_path))
