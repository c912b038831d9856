"""Write the finished student as a Hugging Face folder, with whole weights and merged adapters."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from regate_ds.job.process import Process
from regate_ds.recipe.saving.checkpoint import writing
from regate_ds.recipe.students.student import Student
from regate_ds.stores.atomic_file import sync_files


def save_model(
    folder: Path, student: Student, weights: dict[str, Tensor], process: Process
) -> None:
    """Write the student with its trained weights as a Hugging Face folder. Collective.

    The weights are the first rank's.
    """
    if process.is_first:
        with writing(folder):
            student.model.save_pretrained(folder, state_dict=weights)
            student.tokenizer.save_pretrained(folder)
            student.vision.processor.save_pretrained(folder)
            sync_files(folder)
    dist.barrier()


def whole_weights(model: nn.Module, process: Process) -> dict[str, Tensor]:
    """Return every weight under the bare model's names, with adapters merged; see below."""
    weights = full_weights(model, process)
    config: Any = getattr(model, "peft_config", None)
    return merge_lora(weights, config["default"]) if config and weights else weights


def full_weights(model: nn.Module, process: Process) -> dict[str, Tensor]:
    """Return every weight in the first rank's CPU memory, and nothing elsewhere. Collective.

    Under ZeRO-3 the weights are gathered one by one.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        with _gathered(parameter):
            if process.is_first:
                weights[name] = parameter.detach().to("cpu", copy=True)
    return weights


def _gathered(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def merge_lora(weights: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Return weights under the bare model's names, with W + alpha / rank * B A for each adapter."""
    merged: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if ".lora_" in name:
            continue
        bare = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if ".base_layer.weight" in name:
            stem = name.removesuffix("base_layer.weight")
            up, down = (
                weights[f"{stem}lora_B.default.weight"],
                weights[f"{stem}lora_A.default.weight"],
            )
            weight = weight + (config.lora_alpha / config.r) * (up @ down)
        merged[bare] = weight
    return merged
