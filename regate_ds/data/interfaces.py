"""What the loader needs of a family's image processor, and of what writes records as tokens.

Shapes: S positions of one sample, B rows, T positions of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from regate_ds.data.llava.records import Record, SampleError
from regate_ds.data.llava.sample import EncodedSample


class VisionInputs(Protocol):
    """Makes the image inputs of one family of students."""

    def num_tokens(self, size: tuple[int, int]) -> int:
        """Return the number of placeholders of one image of (width, height)."""
        ...

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of the placeholders of one image of (width, height)."""
        ...

    def pixels(self, images: list[Image.Image]) -> dict[str, Tensor]:
        """Make the model inputs of RGB images, at least one, in reading order."""
        ...

    def sample_pixels(self, samples: list[list[Any]]) -> dict[str, Tensor]:
        """Make the model inputs of a micro-batch, given what each sample shows, if it shows any.

        They are those of ``pixels`` for RGB images, unless the model is told which images belong
        together. Only students whose records hold videos as a whole are given a ``Clip``.
        """
        ...

    def extra_inputs(self, input_ids_BT: Tensor, is_placeholder_BT: Tensor) -> dict[str, Tensor]:
        """Make further model inputs that follow from the tokens; by default there are none."""
        return {}


class RecordEncoder(Protocol):
    """Writes records as tokens: by the package's own template, or by a model's chat template."""

    @property
    def takes_videos(self) -> bool:
        """Whether records hold videos as a whole, in place of an image for each frame."""
        ...

    @property
    def end_ids(self) -> list[int]:
        """Ids of the tokens that end an answer."""
        ...

    def encode(self, record: Record) -> EncodedSample:
        """Encode one record; only the sizes of its images are read. SampleError if it is bad."""
        ...

    def encode_all(self, records: Sequence[Record]) -> Iterator[EncodedSample | SampleError]:
        """Yield each record encoded, or its error. ``char_spans`` are left empty."""
        ...

    def prompt(self, record: Record, sample: EncodedSample, turn: int) -> tuple[Tensor, Tensor]:
        """Return ids [S] and image numbers [S] of what a model reads before it answers a turn."""
        ...

    def uncut(self, tokenizer: Any = None, *, placeholder_id: int | None = None) -> RecordEncoder:
        """Make an encoder of the same record without a greatest length.

        tokenizer: another one to use. placeholder_id: its token for image positions.
        """
        ...

    def settings(self) -> dict[str, Any]:
        """Return what decides the tokens of a record, as JSON can hold it.

        Its ``tokenizer`` is a text: the tokenizer's rules.
        """
        ...

    def is_cut(self, sample: EncodedSample) -> bool:
        """Return whether the greatest length may have cut the sample's end off."""
        ...

    def begins_with_answer(self, record: Record) -> bool:
        """Return whether the sample's first token is an answer's, so that no token predicts it."""
        ...
