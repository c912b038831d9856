"""What the teacher cannot predict: its loss alone, the same in every step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regate_ds.algorithm.scores.score import Column, ScoreInputs, Statistic


@dataclass(frozen=True, kw_only=True)
class ReferenceOnly:
    """The reference loss; nothing of the student is remembered."""

    @property
    def column(self) -> Column:
        return "text"

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return ()

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        assert inputs.reference_N is not None
        return inputs.reference_N
