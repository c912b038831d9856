"""Where a picture or video of a record lies: in files of its own, in the record, or in a video."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TypeVar


@dataclass(frozen=True)
class InlineImage:
    """An image file whose bytes lie in the record, as in a Parquet file."""

    content: bytes = field(repr=False)
    name: str = field(compare=False)
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


@dataclass(frozen=True)
class VideoShape:
    """What is known of a video before it is decoded."""

    size: tuple[int, int]
    """Width and height of its frames."""

    num_frames: int
    fps: float | None
    """Frames a second; None if they are not known, as of a list of pictures."""

    is_file: bool
    """False: a list of frames, all of which are wanted."""


@dataclass(frozen=True)
class Video:
    """A video that a model's own processor takes as a whole, and chooses the frames of."""

    source: Path | tuple[Path | InlineImage, ...]
    """A file, or its frames."""

    shape: VideoShape | None = None
    """None before it was looked at."""

    taken: tuple[int, ...] = ()
    """Numbers of the frames that the processor takes; empty before it was asked."""

    def __str__(self) -> str:
        if isinstance(self.source, Path):
            return str(self.source)
        return f"of {len(self.source)} frames ({self.source[0]}, ...)"


PictureSource = Path | InlineImage | VideoFrame
ImageSource = PictureSource | Video
"""Equal sources show the same."""


_Source = TypeVar("_Source")


def pictures_alone(sources: Iterable[ImageSource]) -> list[PictureSource]:
    """Return the sources of a record that holds no video as a whole."""
    pictures: list[PictureSource] = []
    for source in sources:
        assert not isinstance(source, Video)
        pictures.append(source)
    return pictures


def by_file(sources: Iterable[_Source]) -> Iterator[list[_Source]]:
    """Yield images one by one, and the frames of one video file together."""
    # A new object is equal to no other.
    for _, run in groupby(sources, lambda s: s.video if isinstance(s, VideoFrame) else object()):
        yield list(run)
