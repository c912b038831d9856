"""The contract of a ranking.

    place_M = ranking(inputs)

the place of each image token in its image's order: 0 is kept first. In each image the places are 0
to n - 1, each once. What an order is made of is declared by ``stored``: a ranking with a name there
reads orders that were computed once, and its ``order`` is what computes one.

Shapes: I images, M their tokens, image by image, n tokens of one image, P values of a patch, F
features of a token, L layers of the tower.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from regate_ds.algorithm.batch import SampleKey

ImageKey = tuple[SampleKey, int]
"""A sample's key, and the number of the image in the sample."""

Reads = Literal["pixels", "features", "attention"]


@dataclass(frozen=True, kw_only=True)
class RankingInputs:
    """What a ranking may be made of, for the images of a micro-batch."""

    step: int
    keys: tuple[ImageKey, ...]
    sizes_I: Tensor
    """int64: tokens of each image that may be elided: all but those that predict an answer, and but
    the first position of a sample."""

    num_kept_I: Tensor
    """int64: how many of each image's tokens the step keeps."""

    orders: Sequence[Tensor] | None = None
    """For each image these tokens, numbered from 0, in stored order, int64 [n]; None unless the
    ranking reads them."""


class Ranking(Protocol):
    """A frozen dataclass with the knobs of one order."""

    @property
    def stored(self) -> str | None:
        """Name of the ranking whose stored orders are read; None if nothing is stored."""
        ...

    def __call__(self, inputs: RankingInputs) -> Tensor:
        """Return the place [M] of each token in its image's order."""
        ...


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What is known of one image's tokens; None where it was not asked for."""

    pixels_nP: Tensor | None = None
    """fp32: the pixel values of each token's patch, as the tower gets them."""

    features_nF: Tensor | None = None
    """fp32: what the projector gives the decoder."""

    attention_Ln: Tensor | None = None
    """fp32: attention that each token receives in each layer of the tower: the column sums of the
    attention matrix, mean over heads. A merged token has the sum of its patches'."""


class StoredRanking(Ranking, Protocol):
    """A ranking whose orders are computed once, from the tower."""

    @property
    def stored(self) -> str:
        """Name and knobs of the ranking, as the store of its orders has them."""
        ...

    @property
    def reads(self) -> Reads:
        """Which field of a Picture ``order`` reads."""
        ...

    def order(self, picture: Picture, num_first: int) -> Tensor:
        """Return the ``num_first`` tokens that are kept first, in this order: int64 [num_first]."""
        ...


class ByStoredOrder:
    """What rankings whose orders are computed once have in common: they rank as the store says."""

    def __call__(self, inputs: RankingInputs) -> Tensor:
        """Return the place [M] of each token in its image's order."""
        assert inputs.orders is not None
        parts = [torch.empty_like(n).index_copy(0, n, torch.arange(len(n))) for n in inputs.orders]
        return torch.cat([torch.empty(0, dtype=torch.int64), *parts])


def by_value(value_n: Tensor) -> Tensor:
    """Return the tokens by falling value; ties go to the lower index."""
    return value_n.argsort(descending=True, stable=True)
