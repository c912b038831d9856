"""Prepare a student for training: which parts of it are trained, and how."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.families.table import family_of
from regate_ds.recipe.students.config import LoraConfig, ModelConfig
from regate_ds.recipe.students.student import Student


def trainable(student: Student, config: ModelConfig, *, seed: int) -> nn.Module:
    """Return the student ready to train: with LoRA, frozen tower and checkpointing, if asked.

    Adapters get their weights from ``seed`` alone.
    """
    model: nn.Module = student.model
    if config.freeze_vision:
        family_of(student.model).tower_of(student.model).requires_grad_(False)
    if config.gradient_checkpointing:
        student.model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.lora is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _with_lora(student, config.lora)
    return model.train()


def _with_lora(student: Student, config: LoraConfig) -> Any:
    import peft

    _require_targets(student, config.target_modules)
    student.model.enable_input_require_grads()
    return peft.get_peft_model(student.model, peft_config(student, config))


def peft_config(student: Student, config: LoraConfig) -> Any:
    """Return the adapters' settings as peft has them."""
    import peft

    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type] (a float scales as well)
        lora_dropout=config.dropout,
        target_modules=_pattern(student, config),
    )


def _pattern(student: Student, config: LoraConfig) -> str:
    """Return a regular expression for the full names of the layers that get an adapter.

    The vision tower has layers of the same names; adapters belong to the text backbone.
    """
    modules = "|".join(map(re.escape, config.target_modules))
    return rf".*{family_of(student.model).decoder}.*\.({modules})"


def adapter_starts(
    student: Student, config: LoraConfig, *, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield each adapted layer's name with the first A [rank, inputs]; every B begins at zero.

    They are those of ``trainable`` with this seed, bit for bit. The student may be on "meta".
    """
    _require_targets(student, config.target_modules)
    pattern, drawn = re.compile(_pattern(student, config)), torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> Tensor:
        weight = torch.empty(rows, columns)
        return nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=drawn)

    for name, layer in student.model.named_modules():
        if pattern.fullmatch(name):
            assert isinstance(layer, nn.Linear)
            # peft 0.21 makes two layers of torch, which draw their weights, and draws A again.
            draw(config.rank, layer.in_features)
            draw(layer.out_features, config.rank)
            yield name, draw(config.rank, layer.in_features)


def _require_targets(student: Student, targets: Sequence[str]) -> None:
    """Refuse any target that the backbone lacks; peft itself needs only one of several."""
    linear = {
        name.rpartition(".")[2]
        for name, module in student.model.named_modules()
        if isinstance(module, nn.Linear) and f"{family_of(student.model).decoder}." in name
    }
    for target in targets:
        if target not in linear:
            raise ValueError(
                f"model.lora.target_modules: the text backbone has no linear layer {target!r}; it "
                f"has these to choose from: {', '.join(sorted(linear))}"
            )
