"""The order in which a run sees its samples. The seed fixes it, so that compared runs share it.

A step takes the next ``micro_batch * accumulation * world_size`` samples of the epoch's
permutation; samples that do not fill a step at the end of an epoch are left out of that epoch. With
costs, these samples are divided over ranks and micro-batches so that ranks have equally much to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from regate_ds.cost.balance import divide
from regate_ds.cost.sampler import shuffled
from regate_ds.job.process import Process
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.corpus import Corpus
from regate_ds.recipe.estimate.sizes import costs_of

CostsByStep = Callable[[int], Sequence[float]]
"""The cost of each sample of the data set, by the optimizer step."""


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
    costs: CostsByStep | None = None
    """What each sample of the data set costs in a step; None divides samples in order."""

    def __post_init__(self) -> None:
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{self.num_samples} samples do not fill one optimizer step of "
                f"{self.samples_per_step}; lower run.micro_batch or run.accumulation, or use fewer "
                f"data ranks, now {self.world_size} (in regate estimate: --gpus)"
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
                seen_epoch, permutation = epoch, shuffled(self.num_samples, self.seed, epoch)
            begin = step_in_epoch * self.samples_per_step
            yield from self._own(step, permutation[begin : begin + self.samples_per_step].tolist())

    def _own(self, step: int, numbers: list[int]) -> list[list[int]]:
        """Return this rank's micro-batches of a step."""
        if self.costs is not None:
            costs = self.costs(step)
            own = [float(costs[n]) for n in numbers]
            division = divide(own, self.world_size, self.accumulation, equal=True)
            return [[numbers[n] for n in micro] for micro in division[self.rank]]
        starts = [
            (micro * self.world_size + self.rank) * self.micro_batch
            for micro in range(self.accumulation)
        ]
        return [numbers[start : start + self.micro_batch] for start in starts]


def make_order(config: RunConfig, corpus: Corpus, data: Process) -> Order:
    """Return a data rank's order of samples; its ``total_steps`` is the length of the run."""
    run = config.run
    order = Order(
        num_samples=len(corpus.train_records),
        micro_batch=run.micro_batch,
        accumulation=run.accumulation,
        rank=data.rank,
        world_size=data.world_size,
        seed=run.seed,
        total_steps=0,
    )
    total_steps = run.steps or run.epochs * order.steps_per_epoch
    costs = costs_of(config, corpus, total_steps) if run.balance else None
    return replace(order, total_steps=total_steps, costs=costs)
