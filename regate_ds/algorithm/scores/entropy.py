"""How unsure the student was at a position; positions that never ran are kept first."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regate_ds.algorithm.scores.score import ScoreInputs, Statistic


@dataclass(frozen=True, kw_only=True)
class Entropy:
    """The entropy of the student's distribution in the last forward pass, in nats."""

    @property
    def column(self) -> None:
        return None

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return (Statistic(name="entropy", of="entropy"),)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        return inputs.statistics["entropy"]
