"""The order in which a run sees its samples. The seed fixes it, so that compared runs share it.

A step takes the next ``micro_batch * accumulation * world_size`` samples of the epoch's
permutation; samples that do not fill a step at the end of an epoch are left out of that epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from regate_ds.job.process import Process
from regate_ds.recipe.config.tree import RunConfig


@dataclass(frozen=True, kw_only=True)
class Order:
    """Yields the micro-batches of one rank, each a list of sample numbers."""

    num_samples: int
    micro_batch: int
    accumulation: int
    rank: int
    world_size: int
    seed: int
    total_steps: int
    start_step: int = 0

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{self.num_samples} samples do not fill one optimizer step of "
                f"{self.samples_per_step}; lower run.micro_batch or run.accumulation, or use fewer "
                "data ranks"
            )

    @property
    def samples_per_step(self) -> int:
        return self.micro_batch * self.accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.samples_per_step

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        seen_epoch, permutation = -1, torch.empty(0)
        for step in range(self.start_step, self.total_steps):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != seen_epoch:
                seen_epoch, permutation = epoch, self._permutation(epoch)
            begin = step_in_epoch * self.samples_per_step
            for micro in range(self.accumulation):
                start = begin + (micro * self.world_size + self.rank) * self.micro_batch
                yield permutation[start : start + self.micro_batch].tolist()

    def _permutation(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.num_samples, generator=generator)


def make_order(config: RunConfig, num_samples: int, data: Process) -> Order:
    """Return a data rank's order of samples; its ``total_steps`` is the length of the run."""
    run = config.run
    order = Order(
        num_samples=num_samples,
        micro_batch=run.micro_batch,
        accumulation=run.accumulation,
        rank=data.rank,
        world_size=data.world_size,
        seed=run.seed,
        total_steps=0,
    )
    return replace(order, total_steps=run.steps or run.epochs * order.steps_per_epoch)
