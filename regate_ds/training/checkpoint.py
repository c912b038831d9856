"""Checkpoints of a run: the engine's own files, the method's state, random states, and the model.

checkpoints/step-000120/          the engine's folder, with regate/ and random-<rank>.pt inside
checkpoints/latest                names the newest complete one
model/                            the final student, as a Hugging Face folder
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regate_ds.adapters.deepspeed import DeepSpeedRegate
from regate_ds.data.atomic_file import write_atomically
from regate_ds.training.process import Process
from regate_ds.training.student import Student


def save_checkpoint(
    folder: Path, step: int, engine: Any, regate: DeepSpeedRegate, process: Process
) -> None:
    """Write all that a resumed run needs, and only then name it in ``latest``. Collective."""
    tag = f"step-{step:06d}"
    engine.save_checkpoint(str(folder), tag=tag, client_state={"step": step}, save_latest=False)
    regate.save(folder / tag)
    torch.save(_random_state(process), folder / tag / f"random-{process.rank}.pt")
    dist.barrier()
    if process.is_first:
        write_atomically(folder / "latest", tag.encode())


def load_checkpoint(folder: Path, engine: Any, regate: DeepSpeedRegate, process: Process) -> int:
    """Take over the newest checkpoint and return the number of steps it has done. Collective.

    ValueError if there is none. Random states are taken over where the number of ranks is the same.
    """
    tag = latest(folder)
    if tag is None:
        raise ValueError(f"{folder} holds no complete checkpoint; start without run.resume=true")
    _, client_state = engine.load_checkpoint(str(folder), tag=tag)
    regate.load(folder / tag, engine)
    random_file = folder / tag / f"random-{process.rank}.pt"
    if random_file.is_file():
        _set_random_state(torch.load(random_file, weights_only=True), process)
    return client_state["step"]


def latest(folder: Path) -> str | None:
    """Tag of the newest complete checkpoint."""
    pointer = folder / "latest"
    return pointer.read_text() if pointer.is_file() else None


def prune_checkpoints(folder: Path, keep: int | None) -> None:
    """Delete all but the newest ``keep`` checkpoints; one process calls it."""
    if keep is None:
        return
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def save_model(folder: Path, student: Student, model: nn.Module, process: Process) -> None:
    """Write the trained student as a Hugging Face folder, adapters merged. Collective."""
    weights = full_weights(model, process)
    if process.is_first:
        if hasattr(model, "peft_config"):
            weights = merge_lora(weights, model.peft_config["default"])
        student.model.save_pretrained(folder, state_dict=weights)
        student.tokenizer.save_pretrained(folder)
        student.vision.processor.save_pretrained(folder)
    dist.barrier()


def full_weights(model: nn.Module, process: Process) -> dict[str, Tensor]:
    """Every weight on the first rank's CPU, gathered one by one under ZeRO-3. Collective."""
    import deepspeed

    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        partitioned = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter]) if partitioned else nullcontext():
            if process.is_first:
                weights[name] = parameter.detach().to("cpu", copy=True)
    return weights


def merge_lora(weights: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Add each adapter to its matrix, W + alpha / rank * B A, under the bare model's names."""
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


def _random_state(process: Process) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if process.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(process.device)
    return states


def _set_random_state(states: dict[str, Tensor], process: Process) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], process.device)
