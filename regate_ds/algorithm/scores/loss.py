"""The student's last loss at a position; positions that never ran are kept first."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regate_ds.algorithm.scores.score import ScoreInputs, Statistic


@dataclass(frozen=True, kw_only=True)
class LastLoss:
    """The loss of the position's last forward pass, in nats."""

    @property
    def column(self) -> None:
        return None

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return (Statistic(name="loss"),)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        return inputs.statistics["loss"]
