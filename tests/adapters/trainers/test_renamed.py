"""Checkpoints that transformers writes under other names than the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from regate_ds import Keyed, RegateConfig
from regate_ds.adapters.trainers.hf_trainer import RegateTrainer
from regate_ds.algorithm.scores.random import Random
from tests.adapters.huggingface.test_joined_rows import padded, text_items
from tests.adapters.trainers.plain_trainer_helper import settings
from tests.support.models import causal_lm, llava


def saved(model: nn.Module, folder: Path, *, enabled: bool = True) -> tuple[RegateTrainer, Any]:
    """Save a checkpoint, then change every weight: return the trainer and what was saved."""
    trainer = RegateTrainer(
        model=model,
        args=settings(folder),
        train_dataset=Keyed(text_items(), "mine"),
        data_collator=padded,
        regate=RegateConfig(enabled=enabled, score=Random()),
    )
    trainer.save_model(str(folder))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    return trainer, weights


def equal(model: nn.Module, weights: Any) -> list[bool]:
    return [torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items()]


@pytest.mark.parametrize("load", ["resume", "best"])
@pytest.mark.parametrize("make", [llava, lambda: causal_lm(tie_word_embeddings=True)])
def test_weights_under_other_names_are_loaded(make: Any, load: str, tmp_path: Path):
    trainer, weights = saved(make(), tmp_path)
    if load == "resume":
        trainer._load_from_checkpoint(str(tmp_path))
    else:
        trainer.state.best_model_checkpoint = str(tmp_path)
        trainer._load_best_model()
    assert all(equal(trainer.model, weights))


def test_without_elision_the_run_is_trainers_own_which_does_not_find_them(tmp_path: Path):
    """If this fails, transformers has mended it, and `renamed.py` may go."""
    trainer, weights = saved(llava(), tmp_path, enabled=False)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not set(file.keys()) & weights.keys()
    trainer._load_from_checkpoint(str(tmp_path))
    assert not any(equal(trainer.model, weights))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path):
    saved(llava(num_layers=2), tmp_path)
    trainer, _ = saved(llava(), tmp_path / "other")
    with pytest.raises(RuntimeError, match=r"of the model's weights, as .* resume from a"):
        trainer._load_from_checkpoint(str(tmp_path))
