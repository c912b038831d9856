"""The control: positions drawn anew in each step, from the sample's key and not from its rank."""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regate_ds.algorithm.draw import generator
from regate_ds.algorithm.knobs import refuse_knobs
from regate_ds.algorithm.scores.score import ScoreInputs, Statistic


@dataclass(frozen=True, kw_only=True)
class Random:
    """Every label position is as likely as any other; no store is needed."""

    seed: int = 0
    """Seed of the draw: with the sample's key and the step it decides all values."""

    def __post_init__(self) -> None:
        refuse_knobs(self)

    @property
    def column(self) -> None:
        return None

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return ()

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        counts: list[int] = inputs.num_labels_S.tolist()
        parts = [
            torch.rand(count, generator=generator(self.seed, inputs.step, key))
            for key, count in zip(inputs.keys, counts, strict=True)
        ]
        return torch.cat([torch.empty(0), *parts])
