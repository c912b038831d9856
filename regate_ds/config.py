"""The settings of the method: docs/algorithm.md explains them, arXiv 2507.21420 is the paper."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from regate_ds.algorithm.schedule import Schedule

Align = Literal["predictor", "target", "both"]
Fusion = Literal["additive", "convex"]


@dataclass(frozen=True, kw_only=True)
class RegateConfig:
    """What a run keeps, in which steps, and in which decoder layers.

    Frozen. A value that is impossible raises ValueError when the object is made.
    """

    enabled: bool = True
    """False: no hook is installed and the run is the host's own, bit for bit."""

    total_steps: int
    """Optimizer steps of the whole run; the schedule counts from 0. A resume must repeat it."""

    keep_share: float = 0.5
    """Share of a sample's label positions that enter gated layers in a sparse step; 1.0 makes every
    step dense (the baseline that elision is measured against)."""

    first_layer: int = 1
    """Index of the first gated decoder layer: how many layers before it see every token."""

    last_layer: int | None = None
    """Index after the last gated layer; null is the depth of the decoder."""

    align: Align = "predictor"
    """Which position a hard target keeps: the one whose output predicts it, the one that holds it
    (`target`), or `both`."""

    fusion: Fusion = "additive"
    """`additive`: difficulty + weight * reference. `convex`: (1 - weight) * difficulty + weight *
    reference."""

    reference_weight: float = 0.5
    """lambda, the weight of the teacher's loss in the score."""

    decay: float = 0.9
    """beta, the share of the old value in the moving average of a position's loss."""

    warmup: float = 0.05
    """Dense steps at the start: a count, or a share of total_steps below 1."""

    cycle_steps: int = 0
    """Length of a cycle after the warm-up, in steps; 0 means no cycles."""

    cycle_dense_steps: int = 0
    """Dense steps at the start of each cycle."""

    final_dense_share: float = 0.12
    """Share of total_steps at the end of the run that is dense."""

    token_multiple: int = 1
    """Rows of kept tokens are a multiple of this length, filled with the next-best label positions
    and, where a sample has none left, with padding."""

    def __post_init__(self) -> None:
        # A range is checked only where all types are right: the comparisons need numbers.
        for key, problem in self._type_problems() or self._range_problems():
            raise ValueError(f"{key}={getattr(self, key)!r}: {problem}")

    @property
    def num_warmup_steps(self) -> int:
        return round(self.warmup * self.total_steps) if self.warmup < 1 else int(self.warmup)

    @property
    def num_final_dense_steps(self) -> int:
        return round(self.final_dense_share * self.total_steps)

    def _type_problems(self) -> list[tuple[str, str]]:
        ints = [f.name for f in fields(self) if f.type in ("int", "int | None")]
        floats = [f.name for f in fields(self) if f.type == "float"]
        return (
            [(k, "must be a whole number") for k in ints if not _is_integer(getattr(self, k), k)]
            + [(k, "must be a number") for k in floats if not _is_number(getattr(self, k))]
            + [("enabled", "must be true or false") for _ in [0] if not _is_bool(self.enabled)]
        )

    def _range_problems(self) -> list[tuple[str, str]]:
        rules = [
            ("total_steps", self.total_steps >= 1, "must be at least 1"),
            # A smaller share would keep no position at all: k = ceil(p * n - 1e-9).
            ("keep_share", 1e-6 <= self.keep_share <= 1.0, "must be in [1e-6, 1]"),
            ("first_layer", self.first_layer >= 0, "must be 0 or more"),
            (
                "last_layer",
                self.last_layer is None or self.last_layer > self.first_layer,
                f"must be above first_layer={self.first_layer}, or null for the decoder's depth",
            ),
            ("align", self.align in get_args(Align), f"must be one of {get_args(Align)}"),
            ("fusion", self.fusion in get_args(Fusion), f"must be one of {get_args(Fusion)}"),
            ("reference_weight", self.reference_weight >= 0.0, "must be 0 or more"),
            (
                "reference_weight",
                self.fusion != "convex" or self.reference_weight <= 1.0,
                "must be in [0, 1] with fusion=convex",
            ),
            ("decay", 0.0 <= self.decay < 1.0, "must be in [0, 1)"),
            ("warmup", self.warmup >= 0.0, "must be 0 or more"),
            (
                "warmup",
                self.warmup < 1 or float(self.warmup).is_integer(),
                "must be a whole number of steps, or a share below 1",
            ),
            ("cycle_steps", self.cycle_steps >= 0, "must be 0 or more"),
            (
                "cycle_dense_steps",
                0 <= self.cycle_dense_steps <= self.cycle_steps,
                f"must be between 0 and cycle_steps={self.cycle_steps}",
            ),
            ("final_dense_share", 0.0 <= self.final_dense_share <= 1.0, "must be in [0, 1]"),
            ("token_multiple", self.token_multiple >= 1, "must be at least 1"),
        ]
        return [(key, problem) for key, holds, problem in rules if not holds]


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_integer(value: object, key: str) -> bool:
    return (isinstance(value, int) and not _is_bool(value)) or (
        value is None and key == "last_layer"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not _is_bool(value) and math.isfinite(value)


def schedule_of(config: RegateConfig) -> Schedule:
    """Return the schedule of a configuration, with every length as a number of steps."""
    return Schedule(
        total_steps=config.total_steps,
        warmup_steps=config.num_warmup_steps,
        cycle_steps=config.cycle_steps,
        cycle_dense_steps=config.cycle_dense_steps,
        final_dense_steps=config.num_final_dense_steps,
    )
