"""The paper's score: hard for the text-only reference, or still hard for the student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from regate_ds.algorithm.knobs import Rule, refuse_knobs
from regate_ds.algorithm.scores.score import Column, ScoreInputs, Statistic

Fusion = Literal["additive", "convex"]


@dataclass(frozen=True, kw_only=True)
class Fused:
    """Difficulty and reference in one number (arXiv 2507.21420)."""

    fusion: Fusion = "additive"
    """`additive`: difficulty + weight * reference. `convex`: (1 - weight) * difficulty + weight *
    reference, the reading that fits the names of the paper's ablation."""

    reference_weight: float = 0.5
    """lambda, the weight of the teacher's loss in the score."""

    decay: float = 0.9
    """beta, the share of the old value in the moving average of a position's loss."""

    def __post_init__(self) -> None:
        refuse_knobs(self, self._rules)

    def _rules(self) -> list[Rule]:
        weight, known = self.reference_weight, get_args(Fusion)
        return [
            ("fusion", self.fusion in known, f"must be one of {known}"),
            ("decay", 0.0 <= self.decay < 1.0, "must be in [0, 1)"),
            ("reference_weight", weight >= 0.0, "must be 0 or more"),
            (
                "reference_weight",
                self.fusion != "convex" or weight <= 1.0,
                "must be in [0, 1] with fusion=convex",
            ),
        ]

    @property
    def column(self) -> Column:
        return "text"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return (Statistic(name="difficulty", decay=self.decay, unseen=0.0),)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        assert inputs.reference_N is not None
        difficulty_N = inputs.statistics["difficulty"]
        if self.fusion == "convex":
            return torch.lerp(difficulty_N, inputs.reference_N, self.reference_weight)
        return torch.add(difficulty_N, inputs.reference_N, alpha=self.reference_weight)
