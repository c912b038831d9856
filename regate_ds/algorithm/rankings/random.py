"""Image tokens drawn anew in each step: every token is as likely as any other."""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regate_ds.algorithm.draw import generator
from regate_ds.algorithm.knobs import refuse_knobs
from regate_ds.algorithm.rankings.ranking import RankingInputs


@dataclass(frozen=True, kw_only=True)
class RandomOrder:
    """A new order for each image in each step; no store is needed."""

    seed: int = 0
    """Seed of the draw: with the sample's key, the image's number and the step it decides all."""

    def __post_init__(self) -> None:
        refuse_knobs(self)

    @property
    def stored(self) -> None:
        return None

    def __call__(self, inputs: RankingInputs) -> Tensor:
        parts = [
            torch.randperm(size, generator=generator(self.seed, inputs.step, sample, image))
            for (sample, image), size in zip(inputs.keys, inputs.sizes_I.tolist(), strict=True)
        ]
        return torch.cat([torch.empty(0, dtype=torch.int64), *parts])
