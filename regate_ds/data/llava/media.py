"""Where a picture of a record lies: in a file of its own, in the record itself, or in a video."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path


@dataclass(frozen=True)
class InlineImage:
    """An image file whose bytes lie in the record, as in a Parquet file."""

    content: bytes = field(repr=False)
    name: str
    """What messages call it."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class VideoFrame:
    """One of several frames that are taken from a video file at even distances."""

    video: Path
    number: int
    of: int
    """Number of frames that are taken from the file."""

    def __str__(self) -> str:
        return str(self.video)


ImageSource = Path | InlineImage | VideoFrame
"""Equal sources show the same picture."""


def by_file(sources: Iterable[ImageSource]) -> Iterator[list[ImageSource]]:
    """Yield images one by one, and the frames of one video file together."""
    # A new object is equal to no other.
    for _, run in groupby(sources, lambda s: s.video if isinstance(s, VideoFrame) else object()):
        yield list(run)
