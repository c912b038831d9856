"""What the student still finds hard: the moving average of its own loss, without a teacher."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regate_ds.algorithm.knobs import refuse_knobs
from regate_ds.algorithm.scores.score import ScoreInputs, Statistic


@dataclass(frozen=True, kw_only=True)
class DifficultyOnly:
    """The paper's difficulty alone; 0 at a position that never ran."""

    decay: float = 0.9
    """beta, the share of the old value in the moving average of a position's loss."""

    def __post_init__(self) -> None:
        refuse_knobs(self, lambda: [("decay", 0.0 <= self.decay < 1.0, "must be in [0, 1)")])

    @property
    def column(self) -> None:
        return None

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return (Statistic(name="difficulty", decay=self.decay, unseen=0.0),)

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        return inputs.statistics["difficulty"]
