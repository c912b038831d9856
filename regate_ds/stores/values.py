"""What a session needs from a store: read values, and for the difficulty also write them.

Shapes: N label positions of the samples that a call names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from regate_ds.algorithm.batch import SampleKey, TokenBatch


class Values(Protocol):
    """A store that can be read."""

    def read(self, keys: Sequence[SampleKey]) -> Tensor:
        """Return fp32 [N]: one value for each label position of these samples, in this order."""
        ...


class MutableValues(Values, Protocol):
    """A store that can be read and written."""

    def admit(self, window: Sequence[TokenBatch]) -> None:
        """Take note of the samples to read and write next. ValueError if the store refuses one."""
        ...

    def write(self, keys: Sequence[SampleKey], values_N: Tensor) -> None:
        """Replace the values of these samples."""
        ...
