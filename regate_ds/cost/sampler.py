"""A batch sampler whose ranks have about equally much to do.

    sampler = BalancedBatches(costs, batch_size=256, rank=rank, world_size=world, micro_batches=4)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=collate)

The samples of a global batch depend on seed, epoch and batch size alone: runs with and without
elision, and on any number of ranks, take the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from regate_ds.cost.balance import divide, micro_batches_needed


class BalancedBatches:
    """Yields the micro-batches of one rank, as lists of sample numbers, step after step.

    Each sample comes once an epoch, but for those that fill no global batch at its end.
    """

    def __init__(  # noqa: PLR0913 (a sampler's settings, each by its name)
        self,
        costs: Callable[[int], Sequence[float]] | Sequence[float],
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        micro_batches: int | None = None,
        tokens: Sequence[int] | None = None,
        max_tokens: int | None = None,
        equal: bool = False,
        seed: int = 0,
        epochs: int = 1,
    ) -> None:
        """costs: of each sample of the data set, or a function of the optimizer step that returns
            them: a sparse step has others than a dense one.
        batch_size: samples of an optimizer step, over all ranks.
        micro_batches: of a step on each rank; None takes as few as fit ``max_tokens``, and
            ``steps`` then says how many they are.
        tokens, max_tokens, equal: as for ``divide``.

        ValueError if the samples do not fill a step, or neither number nor budget is given.
        """
        self._costs = costs if callable(costs) else lambda _: costs
        self.num_samples = len(self._costs(0))
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self._micro, self._tokens, self._max = micro_batches, tokens, max_tokens
        self._equal, self._seed, self._epochs = equal, seed, epochs
        self._shuffled: tuple[int, torch.Tensor] | None = None
        """An epoch, and its order."""
        self.step = 0
        """The optimizer step that comes next."""
        if micro_batches is None and (tokens is None or max_tokens is None):
            raise ValueError("micro_batches=None needs tokens and max_tokens; give them, or 1")
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"batch_size={batch_size}: {self.num_samples} samples do not fill it; lower it"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.batch_size

    @property
    def total_steps(self) -> int:
        return self._epochs * self.steps_per_epoch

    def steps(self) -> Iterator[list[list[int]]]:
        """Yield this rank's micro-batches of each step that is left."""
        while self.step < self.total_steps:
            step, self.step = self.step, self.step + 1
            yield self.division(step)[self.rank]

    def __iter__(self) -> Iterator[list[int]]:
        for micro_batches in self.steps():
            yield from micro_batches

    def __len__(self) -> int:
        """Return the number of micro-batches that are left, where each step has equally many."""
        if self._micro is None:
            raise TypeError("steps differ in their number of micro-batches; ask total_steps")
        return (self.total_steps - self.step) * self._micro

    def division(self, step: int) -> list[list[list[int]]]:
        """Return the sample numbers of a step, by rank and micro-batch; the same on all ranks."""
        numbers, costs = self.global_batch(step), self._costs(step)
        own = [float(costs[n]) for n in numbers]
        tokens = None if self._tokens is None else [self._tokens[n] for n in numbers]
        num_micro = self._micro
        if num_micro is None:
            assert tokens is not None
            assert self._max is not None
            num_micro = micro_batches_needed(own, self.world_size, tokens, self._max)
        division = divide(
            own,
            self.world_size,
            num_micro,
            tokens=tokens,
            max_tokens=self._max,
            equal=self._equal,
        )
        return [[[numbers[n] for n in micro] for micro in rank] for rank in division]

    def global_batch(self, step: int) -> list[int]:
        """Return the samples of a step, whatever they cost and however many ranks there are."""
        epoch, place = divmod(step, self.steps_per_epoch)
        begin = place * self.batch_size
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = epoch, shuffled(self.num_samples, self._seed, epoch)
        return self._shuffled[1][begin : begin + self.batch_size].tolist()

    def state_dict(self) -> dict[str, int]:
        """Return where the sampler is; a loader that reads ahead is further than its loop."""
        return {"step": self.step, "batch_size": self.batch_size, "seed": self._seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a step. ValueError if the steps are then others."""
        for key, own in (("batch_size", self.batch_size), ("seed", self._seed)):
            if state[key] != own:
                raise ValueError(
                    f"{key}={own}, but the saved order has {state[key]}; resume with the same"
                )
        self.step = state["step"]


class BalancedSampler:
    """Yields one epoch's samples in the order in which a sampler of micro-batches deals them out.

    For hosts that make micro-batches themselves and deal them to their ranks in turn, as
    ``transformers.Trainer`` does through accelerate: return one from ``_get_train_sampler``. Every
    micro-batch has ``batch_size / world_size / micro_batches`` samples.
    """

    def __init__(
        self,
        costs: Callable[[int], Sequence[float]] | Sequence[float],
        *,
        batch_size: int,
        world_size: int,
        micro_batches: int,
        seed: int = 0,
    ) -> None:
        """Take what ``BalancedBatches`` takes; ValueError as there, and from ``divide``."""
        self._batches = BalancedBatches(
            costs,
            batch_size=batch_size,
            rank=0,
            world_size=world_size,
            micro_batches=micro_batches,
            equal=True,
            seed=seed,
        )
        self._micro, self.epoch = micro_batches, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self._batches.steps_per_epoch * self._batches.batch_size

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self._batches.steps_per_epoch
        for step in range(first, first + self._batches.steps_per_epoch):
            division = self._batches.division(step)
            for micro in range(self._micro):
                for rank in division:
                    yield from rank[micro]


def shuffled(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """Return the order of an epoch's samples, int64 [num_samples]."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_samples, generator=generator)
