"""The contract of a score.

    values_N = score(inputs)

one value for each label position of the step's window on this data rank. The position with the
highest value is kept first; ties go to the earlier position. A score says what it needs, and is
given that and nothing else.

Shapes: S samples of the window, N label positions of these, sample by sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from regate_ds.algorithm.batch import SampleKey

Column = Literal["text", "student", "gain"]
"""What a reference store holds: the text-only teacher's losses, those of the student's starting
weights with the image, or the first less the second."""


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """A column of the difficulty store: what is remembered of a position's last forward passes."""

    name: str
    """Name of the column, which is saved and resumed under it."""

    of: str = "loss"
    """What the adapter records of a kept target: ``loss``, ``entropy``, or another name given to
    ``record``."""

    decay: float = 0.0
    """Share of the old value in a moving average; 0 remembers the last value alone."""

    unseen: float = math.inf
    """Value of a position that never ran: infinity keeps it first."""


@dataclass(frozen=True, kw_only=True)
class ScoreInputs:
    """What a score may be made of, for all label positions of a window."""

    step: int
    keys: tuple[SampleKey, ...]
    """Samples of the window, in reading order; none where the choice is made after the forward
    pass, of a micro-batch as a whole."""

    num_labels_S: Tensor
    """int64 [S]: label positions of each sample; there of all together."""

    reference_N: Tensor | None = None
    """fp32, in nats: the reference store's values, where the score reads them."""

    statistics: Mapping[str, Tensor]
    """fp32 [N] for each statistic that the score needs, by its name."""


class Score(Protocol):
    """A frozen dataclass with the knobs of one rule."""

    @property
    def column(self) -> Column | None:
        """What of a reference store is read: `text` is the teacher's losses; None reads none."""
        ...

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """Columns of the difficulty store that are read and updated."""
        ...

    def __call__(self, inputs: ScoreInputs) -> Tensor:
        """Return one value [N] for each label position; neither NaN nor minus infinity."""
        ...
