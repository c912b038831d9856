"""What the session reads and writes of a store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from regate_ds.algorithm.batch import SampleKey, TokenBatch


class Values(Protocol):
    """What a store offers to read: one fp32 value for each label position of the samples."""

    def read(self, keys: Sequence[SampleKey]) -> Tensor: ...


class MutableValues(Values, Protocol):
    def admit(self, window: Sequence[TokenBatch]) -> None:
        """Hear which samples are read and written next; ValueError if they are not the store's."""
        ...

    def write(self, keys: Sequence[SampleKey], values_N: Tensor) -> None: ...
