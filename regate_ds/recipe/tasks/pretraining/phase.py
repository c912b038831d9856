"""What the phases of a student share: finished folders, processes, and an optimiser loop."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.multiprocessing.spawn import spawn

from regate_ds.job.progress import progress
from regate_ds.job.ranks import is_first_rank
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

    image_share: float = 1.0
    """Share of a sample's image tokens that the decoder sees; all of them in a whole step."""

    whole_every: int = 4
    """One step in so many is whole, so that the decoder gets used to both."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.lr <= 0:
            raise ValueError(f"steps and batch must be at least 1 and lr above 0, got {self}")

    def image_shares(self) -> Iterator[float]:
        """Return for each step the share of image tokens that the decoder sees."""
        return (
            self.image_share if (step + 1) % self.whole_every else 1.0 for step in range(self.steps)
        )


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


def side_by_side(*jobs: Callable[[], Path]) -> list[Path]:
    """Run each job in a process of its own, with one thread, and return their results in order."""
    pool = ProcessPoolExecutor(
        len(jobs), get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    with pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def on_ranks(number: int, job: Callable[[ProcessGroup], None]) -> None:
    """Run a job in that many processes at once, each with one thread; they are one group."""
    with TemporaryDirectory() as meeting:
        spawn(_join_and_run, (number, meeting, job), number)


def _join_and_run(
    rank: int, number: int, meeting: str, job: Callable[[ProcessGroup], None]
) -> None:
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=number
    )
    ranks = dist.group.WORLD
    assert ranks is not None
    try:
        job(ranks)
    finally:
        dist.destroy_process_group()


def digest_of_files(files: Iterable[Path]) -> str:
    """Return one hash over the content of files, in the order given."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def average_gradients(model: nn.Module, ranks: ProcessGroup) -> None:
    """Let every backward pass leave in each unfrozen weight the mean gradient of all ranks."""

    def average(weight: Tensor) -> None:
        assert weight.grad is not None
        dist.all_reduce(weight.grad, group=ranks)
        weight.grad /= ranks.size()

    for weight in model.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(average)


def optimise(
    name: str, model: nn.Module, loss: Callable[[Random], Tensor], phase: PhaseConfig, seed: int
) -> None:
    """Train the unfrozen parts of ``model`` with AdamW; ``loss`` draws its batch by a generator."""
    config = OptimizerConfig(lr=phase.lr, betas=(0.9, 0.98), warmup_steps=0.05)
    optimizer = make_optimizer(model, config)
    schedule = make_lr_schedule(optimizer, config, phase.steps)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    rng = Random(seed)
    with progress(phase.steps, desc=name, unit="step", show=is_first_rank()) as bar:
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
