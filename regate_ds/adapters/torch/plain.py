"""Loops of plain torch: one process, DistributedDataParallel, or FSDP2 (``fully_shard``).

Nobody but the loop itself divides by the accumulation there. DDP divides by the number of ranks,
and so does FSDP2, unless it was given a divide factor. Tested with torch 2.13.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule

from regate_ds.parallel.layout import require_group, size_of


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A training loop of plain torch, for ``regate.windows(loader, Loop(...))``."""

    accumulation: int = 1
    """Micro-batches of an optimizer step. The loop must not divide the loss by it."""

    group: ProcessGroup | None = None
    """The ranks that see different samples, which DDP or FSDP2 averages over; None is one rank."""

    device: torch.device | str | None = None
    """Where the model wants its inputs; None is where its first parameter lies."""

    def __post_init__(self) -> None:
        if type(self.accumulation) is not int or self.accumulation < 1:
            raise ValueError(
                f"Loop(accumulation={self.accumulation!r}): must be a whole number, at least 1: "
                "the micro-batches of an optimizer step"
            )


class PlainHost:
    """The host of a ``Loop`` around a model."""

    name, joined_by = "Loop", "torch.distributed.init_process_group()"
    divides_by_accumulation = False

    def __init__(self, loop: Loop, model: nn.Module) -> None:
        self.given, self._sharded = loop, ShardedParts(model)
        self.accumulation = loop.accumulation
        self.num_ranks = size_of(loop.group)
        self.group = loop.group if self.num_ranks > 1 else None
        where = next(model.parameters()).device if loop.device is None else loop.device
        self.device = torch.device(where)

    @property
    def divides_ranks_by(self) -> float:
        return self._sharded.divides_ranks_by(self.num_ranks)

    @property
    def stage(self) -> int:
        return self._sharded.stage

    @property
    def steps_taken(self) -> int:
        return 0

    def require(self) -> None:
        require_group(self.given.group, "Loop")

    def require_boundary(self) -> None:
        """Nothing: the loop itself counts."""

    def begin(self, num_micro: int) -> None:
        """The loop itself knows when a step ends."""
        self._sharded.find()


class ShardedParts:
    """The modules of a model that FSDP2 shards."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.find()

    def find(self) -> None:
        """Look for them anew; once a step is enough, and all that a walk over the model allows."""
        self._parts = [part for part in self._model.modules() if isinstance(part, FSDPModule)]

    @property
    def stage(self) -> int:
        """The ZeRO stage that DDP (1) or FSDP2 (3) is like."""
        return 3 if self._parts else 1

    def divides_ranks_by(self, num_ranks: int) -> float:
        """Return by what DDP or FSDP2 divides the sum of the ranks' gradients.

        ValueError if parts of the model differ, RuntimeError if this torch does not tell.
        """
        found = {factor for part in self._parts for factor in _factors(part)} or {None}
        if len(found) > 1:
            raise ValueError(
                f"FSDP2's divide factors are {sorted(found, key=str)} in parts of one model, whose "
                "gradients would have different scales; call set_gradient_divide_factor with one "
                "value on every sharded module"
            )
        (factor,) = found
        return num_ranks if factor is None else factor


def _factors(part: FSDPModule) -> list[float | None]:
    groups = getattr(part._get_fsdp_state(), "_fsdp_param_groups", None)
    if groups is None:
        raise RuntimeError(
            f"torch {torch.__version__} does not tell by what FSDP2 divides gradients; use "
            "torch 2.13, which this was tested with"
        )
    return [group.gradient_divide_factor for group in groups]
