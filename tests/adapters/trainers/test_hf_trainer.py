"""transformers.Trainer and the examples of launch/, on two gloo ranks: see trainer_checks."""

from __future__ import annotations

from pathlib import Path

from tests.adapters.trainers.hf_trainer_helper import NUM_TRAIN, check_trainer
from tests.support.ranks import run_ranks
from tests.support.small_corpus import make_corpus


def test_trainer_and_the_examples_train_resume_and_can_be_switched_off(tmp_path: Path):
    make_corpus(tmp_path, num_train=NUM_TRAIN, num_test=1)
    run_ranks(check_trainer, 2, str(tmp_path))
