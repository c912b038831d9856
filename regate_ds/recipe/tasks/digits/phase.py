"""What the phases of a student share: a cache of finished folders, and an optimiser loop."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.job.progress import progress
from regate_ds.recipe.optimizer import OptimizerConfig, make_lr_schedule, make_optimizer

UNFINISHED = ".unfinished-"
"""Prefix of a folder that is being made; one left by a killed job may be deleted."""


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """Length, batch and learning rate of one phase."""

    steps: int
    batch: int
    lr: float
    """Highest learning rate, after a twentieth of the steps; a cosine ends it at 0."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.lr <= 0:
            raise ValueError(f"steps and batch must be at least 1 and lr above 0, got {self}")


def finished_phase(cache: Path, name: str, basis: list[Any], make: Callable[[Path], None]) -> Path:
    """Return the folder of a phase, found in ``cache`` or made now; a hash of ``basis`` names it.

    ``basis`` is JSON and holds everything that decides the result. ``make`` fills the folder that
    it is given. The folder gets its name when it is complete, so that a killed phase leaves
    nothing that looks finished.
    """
    digest = hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()
    folder = cache / f"{name}-{digest[:12]}"
    if folder.is_dir():
        return folder
    unfinished = cache / f"{UNFINISHED}{folder.name}-{uuid.uuid4().hex[:8]}"
    unfinished.mkdir(parents=True)
    try:
        make(unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def digest_of_files(files: Iterable[Path]) -> str:
    """Return one hash over the content of files, in the order given."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def optimise(
    name: str, model: nn.Module, loss: Callable[[Random], Tensor], phase: PhaseConfig, seed: int
) -> None:
    """Train the unfrozen parts of ``model`` with AdamW; ``loss`` draws its batch by a generator."""
    config = OptimizerConfig(lr=phase.lr, betas=(0.9, 0.98), warmup_steps=0.05)
    optimizer = make_optimizer(model, config)
    schedule = make_lr_schedule(optimizer, config, phase.steps)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    rng = Random(seed)
    with progress(phase.steps, desc=name, unit="step") as bar:
        for step in range(phase.steps):
            value = loss(rng)
            value.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{float(value.detach()):.3f}")
            bar.update()
