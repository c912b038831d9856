"""A sample that is being written, token by token.

Shapes: S positions of the sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from regate_ds.algorithm.batch import IGNORE
from regate_ds.data.llava.records import Record
from regate_ds.data.llava.sample import CharSpan, EncodedSample

Tokens = tuple[list[int], list[tuple[int, int]] | None]
"""Ids of a text's tokens, and each one's place [start, end) in its characters, if that is asked."""


@dataclass
class Tape:
    """The tokens so far, and what they belong to."""

    ids: list[int] = field(default_factory=list)
    images: list[tuple[int, int]] = field(default_factory=list)
    """Positions [start, end) of each image."""

    answers: list[tuple[int, int]] = field(default_factory=list)
    """Positions [start, end) of each answer, its eos included."""

    spans: list[CharSpan] = field(default_factory=list)
    """Place of each answer token, in order."""

    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Width and height of each image file."""

    def add(self, ids: list[int]) -> tuple[int, int]:
        """Add tokens, and return their positions [start, end)."""
        start = len(self.ids)
        self.ids += ids
        return start, len(self.ids)

    def add_answer(self, number: int, text: str, tokens: Tokens, eos_id: int) -> None:
        """Add the answer of turn ``number``, and the eos after it."""
        ids, places = tokens
        self.answers.append(self.add([*ids, eos_id]))
        if places is not None:
            spans = ((number, start, end) for start, end in places)
            self.spans += [*spans, (number, len(text), len(text))]

    def cuts_an_image(self, length: int) -> bool:
        """Return whether a cut at ``length`` tokens takes placeholders off."""
        return any(max(start, length) < end for start, end in self.images)

    def images_touch(self) -> bool:
        """Return whether the placeholders of an image begin where those of another one end."""
        return any(end == start for (_, end), (start, _) in pairwise(self.images))

    def sample(self, record: Record, length: int) -> EncodedSample:
        """Return the first ``length`` tokens as a sample of the record."""
        ids_S = np.array(self.ids[:length], dtype=np.int64)
        labels_S = np.full(length, IGNORE, dtype=np.int64)
        image_S = np.full(length, -1, dtype=np.int64)
        for start, end in self.answers:
            # No position predicts the first token of a sample.
            start, end = max(start, 1), min(end, length)
            labels_S[start - 1 : max(start, end) - 1] = ids_S[start:end]
        for number, (start, end) in enumerate(self.images):
            image_S[start:end] = number
        first = int(self.answers[0][0] == 0)
        num_labels = int((labels_S != IGNORE).sum())
        return EncodedSample(
            key=record.key,
            input_ids_S=torch.from_numpy(ids_S),
            labels_S=torch.from_numpy(labels_S),
            image_S=torch.from_numpy(image_S),
            char_spans=tuple(self.spans[first : first + num_labels]),
            images=record.images,
            image_sizes=tuple(self.sizes),
        )
