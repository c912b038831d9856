"""Estimate from its configuration what memory and disk a run needs, and read what is free.

    memory of a rank    weights + gradients + optimizer, without activations and buffers
    weights             4 bytes for each parameter, 2 in bf16; cut over the ranks by ZeRO-3
    gradients           as many for each trained parameter; cut by ZeRO-2 and 3
    optimizer           8 bytes for each trained parameter, 12 in bf16; cut by ZeRO-1, 2 and 3
    disk                each checkpoint that is kept, and the one that is being written: weights and
                        optimizer; and the finished model: weights

Megatron-core keeps gradients in 4 bytes. Its tensor and pipeline ranks each hold their part of the
decoder, and expert ranks theirs of the experts. The estimate is for a rank of the first stage,
which holds tower and projector whole.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from regate_ds.families.table import family_of
from regate_ds.job.ranks import Ranks, ranks_on_node
from regate_ds.recipe.config.deepspeed_json import deepspeed_config
from regate_ds.recipe.config.tree import RunConfig

GIB = 2**30


@dataclass(frozen=True)
class Needs:
    """What a run needs, in bytes."""

    memory: int
    """Memory of each rank, on its GPU or else in CPU memory."""

    disk: int
    """Disk space of the whole run."""


def estimate(config: RunConfig, num_ranks: int) -> Needs:
    """Estimate the needs of a run on ``num_ranks`` ranks; the student is made without weights."""
    from regate_ds.recipe.corpus import corpus_student
    from regate_ds.recipe.students.trainable import trainable

    student = corpus_student(config, weights=False)
    model = trainable(student, config.model, seed=0)
    is_bf16, parts, expert_parts = config.run.precision == "bf16", 1, 1
    weights, gradients, optimizer = (2, 2, 12) if is_bf16 else (4, 4, 8)
    if config.parallel is not None:
        gradients, parts = 4, config.parallel.weight_parts
        expert_parts = config.parallel.expert_parts
    stage = _zero_stage(config, num_ranks)

    def bytes_each(parts: int, is_trained: bool) -> float:
        shards = max(num_ranks // parts, 1)
        per_trained = gradients / (shards if stage >= 2 else 1)
        per_trained += optimizer / (shards if stage >= 1 else 1)
        return weights / (shards if stage >= 3 else 1) + per_trained * is_trained

    decoder = family_of(student.model).decoder
    memory, disk, checkpoints = 0.0, 0, _num_checkpoints(config) + 1
    for name, parameter in model.named_parameters():
        size, is_trained = parameter.numel(), parameter.requires_grad
        held = expert_parts if ".experts." in name else parts
        num_parts = held if _is_of_decoder(name, decoder) else 1
        memory += size * bytes_each(held, is_trained) / num_parts
        disk += size * (checkpoints * (weights + optimizer * is_trained) + weights)
    return Needs(int(memory), disk)


def _is_of_decoder(name: str, decoder: str) -> bool:
    """Return whether a weight of the student is cut over tensor and pipeline ranks."""
    return f"{decoder}." in name or "lm_head." in name


def free_memory(ranks: Ranks) -> int:
    """Return the free bytes for this rank: of its GPU, or its share of the node's CPU memory."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info(ranks.local_rank)[0]
    import psutil

    return psutil.virtual_memory().available // ranks_on_node(ranks)


def free_disk(folder: Path) -> int:
    return shutil.disk_usage(existing(folder)).free


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest folder above it that exists."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _zero_stage(config: RunConfig, num_ranks: int) -> int:
    if config.parallel is not None:
        return 1 if config.parallel.distributed_optimizer else 0
    zero = deepspeed_config(config, num_ranks).get("zero_optimization", {})
    return int(zero.get("stage", 0))


def _num_checkpoints(config: RunConfig) -> int:
    run = config.run
    if run.keep_checkpoints is not None:
        return run.keep_checkpoints
    return 1 if not run.save_every or run.steps is None else -(-run.steps // run.save_every)
