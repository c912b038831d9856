"""A DeepSpeed engine as a loop's host: it divides by the accumulation and by the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import ProcessGroup


class EngineHost:
    """The host of a loop around a DeepSpeed engine with ZeRO stage 0 to 3."""

    name, joined_by = "engine", "deepspeed.init_distributed()"
    divides_by_accumulation = True

    def __init__(self, engine: Any) -> None:
        self.given = engine

    @property
    def device(self) -> torch.device:
        return self.given.device

    @property
    def num_ranks(self) -> int:
        return self.given.dp_world_size

    @property
    def group(self) -> ProcessGroup | None:
        return self.given.data_parallel_group if self.num_ranks > 1 else None

    @property
    def accumulation(self) -> int:
        return self.given.gradient_accumulation_steps()

    @property
    def divides_ranks_by(self) -> float:
        return self.num_ranks

    @property
    def stage(self) -> int:
        return self.given.zero_optimization_stage()

    @property
    def steps_taken(self) -> int:
        return self.given.global_steps

    def require(self) -> None:
        if self.given.sequence_parallel_size > 1:
            raise ValueError(
                f"sequence parallel size {self.given.sequence_parallel_size} is not supported "
                "under DeepSpeed; set it to 1"
            )

    def require_boundary(self) -> None:
        # A loop that sets the boundaries by hand does not go by this count.
        by_hand = getattr(self.given, "_is_gradient_accumulation_boundary", None) is not None
        taken = self.given.micro_steps % self.accumulation
        if taken and not by_hand:
            raise RuntimeError(
                f"the engine has counted {taken} of the {self.accumulation} micro-batches of its "
                "step where a window begins; call engine.step() after each engine.backward(...)"
            )

    def begin(self, num_micro: int) -> None:
        """Nothing: the engine counts micro-batches itself."""


def is_engine(given: Any) -> bool:
    """Return whether it is a DeepSpeed engine, known by what is asked of it."""
    return hasattr(given, "dp_world_size") and callable(
        getattr(given, "gradient_accumulation_steps", None)
    )
