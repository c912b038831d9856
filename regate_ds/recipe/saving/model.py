"""Write the finished student as a Hugging Face folder, and its adapters as one of peft."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from regate_ds.job.process import Process
from regate_ds.recipe.saving.checkpoint import writing
from regate_ds.recipe.students.config import LoraConfig, ModelConfig
from regate_ds.recipe.students.student import Student
from regate_ds.recipe.students.trainable import peft_config
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


def save_adapters(
    folder: Path,
    student: Student,
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    process: Process,
) -> None:
    """Write the trained adapters alone, as peft loads them onto the student. Collective.

    The weights are the first rank's.
    """
    assert config.lora is not None
    if process.is_first:
        with writing(folder):
            folder.mkdir(exist_ok=True)
            settings = peft_config(student, config.lora)
            settings.base_model_name_or_path = str(config.path) if config.path else None
            settings.inference_mode = True
            settings.save_pretrained(folder)
            # peft's own names: the wrapper's, then those of the student.
            named = {
                f"base_model.model.{name}": weight.contiguous()
                for name, weight in weights.items()
                if _is_of_adapter(name)
            }
            save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
            sync_files(folder)
    dist.barrier()


def full_weights(model: nn.Module, process: Process) -> dict[str, Tensor]:
    """Return every weight in the first rank's CPU memory, and nothing elsewhere. Collective.

    Names are those of `Engine.weights`, also where peft's model is around the student. Under ZeRO-3
    the weights are gathered one by one.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        with _gathered(parameter):
            if process.is_first:
                weights[_bare(name)] = parameter.detach().to("cpu", copy=True)
    return weights


def _bare(name: str) -> str:
    """Return a weight's name without what peft's model adds to it."""
    bare = name.removeprefix("base_model.model.")
    return bare.replace(".base_layer.", ".").replace(".default.", ".")


def _gathered(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def merge_lora(weights: Mapping[str, Tensor], lora: LoraConfig) -> dict[str, Tensor]:
    """Return weights without adapters, where each that has one is W + alpha / rank * B A."""
    merged: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if _is_of_adapter(name):
            continue
        stem = name.removesuffix("weight")
        if name.endswith(".weight") and f"{stem}lora_A.weight" in weights:
            up, down = weights[f"{stem}lora_B.weight"], weights[f"{stem}lora_A.weight"]
            weight = weight + (lora.alpha / lora.rank) * (up @ down)
        merged[name] = weight
    return merged


def _is_of_adapter(name: str) -> bool:
    return ".lora_" in name
