"""What a session needs from a store: read values, and for the difficulty also write them.

Shapes: N label positions of the samples that a call names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from regate_ds.algorithm.batch import SampleKey, TokenBatch
from regate_ds.algorithm.rankings.ranking import ImageKey


class Values(Protocol):
    """What a store of reference losses offers: one fp32 value for each label position."""

    def read(self, keys: Sequence[SampleKey]) -> Tensor:
        """Return fp32 [N]: one value for each label position of these samples, in this order."""
        ...


class Statistics(Protocol):
    """What a difficulty store offers: named columns, each with one value a label position."""

    def admit(self, window: Sequence[TokenBatch]) -> None:
        """Take note of the samples to read and write next. ValueError if the store refuses one."""
        ...

    def read(self, keys: Sequence[SampleKey]) -> dict[str, Tensor]: ...

    def write(self, keys: Sequence[SampleKey], values: Mapping[str, Tensor]) -> None: ...


class Orders(Protocol):
    """What a store of image orders offers."""

    def read(self, images: Sequence[ImageKey], sizes: Sequence[int]) -> list[Tensor]:
        """Return each image's tokens in their order, int64 [n].

        ValueError names an image that the store lacks, or has with another number of tokens.
        """
        ...


@dataclass(frozen=True)
class Stores:
    """What a session reads; None where its configuration needs nothing of it."""

    reference: Values | None = None
    """The teacher's losses."""

    difficulty: Statistics | None = None
    """What is remembered of the student."""

    orders: Orders | None = None
    """The orders of image tokens, where the ranking reads them."""
