"""A sample as the model reads it: token ids, labels and the places of its images.

Shapes: S positions of one sample.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from regate_ds.algorithm.batch import SampleKey
from regate_ds.data.llava.media import ImageSource

CharSpan = tuple[int, int, int]
"""Turn number, start, end: a token's place in the characters of that turn's answer."""


@dataclass(frozen=True)
class EncodedSample:
    """One sample as the model reads it."""

    key: SampleKey

    input_ids_S: Tensor
    """int64: the token ids, with each image expanded to its placeholders."""

    labels_S: Tensor
    """int64: the token at t+1 where it belongs to an answer (eos included), else IGNORE."""

    image_S: Tensor
    """int64: the number of the image at image positions, -1 elsewhere."""

    char_spans: tuple[CharSpan, ...]
    """Place of each label position's target, in order; that of an eos is (turn, len, len)."""

    images: tuple[ImageSource, ...]
    """Images, in reading order."""

    image_sizes: tuple[tuple[int, int], ...] = ()
    """Width and height of each image file, as it was when the sample was encoded."""

    @property
    def is_placeholder_S(self) -> Tensor:
        """bool: True at image positions."""
        return self.image_S >= 0

    def answer_start(self, turn: int) -> int:
        """Return the position of the first token of a turn's answer, by ``char_spans``."""
        first = next(n for n, (of, _, _) in enumerate(self.char_spans) if of == turn)
        return int((self.labels_S >= 0).nonzero()[first, 0]) + 1

    def __len__(self) -> int:
        return self.input_ids_S.numel()
