"""Rho-1's rule: how far the student's last loss lies above the reference's.

Rho-1 (arXiv 2404.07965) takes the loss of a model that has read the same input. Ours has read the
text alone, so that a position which needs the image has a small or a negative excess.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regate_ds.algorithm.scores.score import ScoreInputs, Statistic


@dataclass(frozen=True, kw_only=True)
class ExcessLoss:
    """Last loss - reference; positions that never ran are kept first."""

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return (Statistic(name="loss"),)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        assert inputs.reference_N is not None
        # Infinite where a position never ran, and so is the difference.
        return inputs.statistics["loss"] - inputs.reference_N
