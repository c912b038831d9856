"""transformers.Trainer and the examples of launch/, on two gloo ranks: see trainer_checks."""

from __future__ import annotations

from pathlib import Path

from tests.adapters.trainers.hf_trainer_helper import NUM_TRAIN, check_trainer
from tests.adapters.trainers.trl_zero_helper import check_trl
from tests.support.ranks import run_ranks
from tests.support.small_corpus import make_corpus


def test_trainer_and_the_examples_train_resume_and_can_be_switched_off(tmp_path: Path):
    make_corpus(tmp_path, num_train=NUM_TRAIN, num_test=1)
    run_ranks(check_trainer, 2, str(tmp_path))


def test_trl_has_the_oracles_gradients_under_zero_2_and_3_and_is_its_own_when_off(tmp_path: Path):
    run_ranks(check_trl, 2, tmp_path)
