"""Rho-1's rule: how far the student's last loss lies above the reference's.

Rho-1 (arXiv 2404.07965) takes the loss of a model that was trained on chosen data and has read the
same input. The reference `student`, the starting weights, has read the same input as well. The
reference `text` has read the text alone, so that a position which needs the image has a small or a
negative excess.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from regate_ds.algorithm.knobs import refuse_knobs
from regate_ds.algorithm.scores.score import Column, ScoreInputs, Statistic

LossOf = Literal["text", "student"]


@dataclass(frozen=True, kw_only=True)
class ExcessLoss:
    """Last loss - reference; positions that never ran are kept first."""

    reference: LossOf = "text"
    """Whose loss is taken off: the text-only teacher's, or that of the `student`'s starting weights
    with the image."""

    def __post_init__(self) -> None:
        known = get_args(LossOf)
        problem = f"must be one of {known}"
        refuse_knobs(self, lambda: [("reference", self.reference in known, problem)])

    @property
    def column(self) -> Column:
        return self.reference

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return (Statistic(name="loss"),)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        assert inputs.reference_N is not None
        # Infinite where a position never ran, and so is the difference.
        return inputs.statistics["loss"] - inputs.reference_N
