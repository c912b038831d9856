"""Read LLaVA-format files into records: what was said, which images belong to it.

Images are opened here only to find the broken ones; the loader's workers decode them later.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from regate_ds.algorithm.batch import SampleKey

MARKER = re.compile("<image>|<video>")
"""What stands in a question where an image or a video belongs."""


@dataclass(frozen=True)
class Turn:
    """One question with its answer."""

    question: str
    """As in the file: ``<image>`` and ``<video>`` are still literal."""

    answer: str

    gold_spans: tuple[tuple[int, int], ...] = ()
    """[start, end) in the answer's characters of words that only the image can tell."""


@dataclass(frozen=True)
class Record:
    """One sample of a data set, checked."""

    key: SampleKey
    id: str | None
    """For messages only: public files repeat or omit it."""

    images: tuple[Path, ...]
    """All images in the order of their markers in the text; a video is its frames, in the order
    of the numbers in their names."""

    images_per_marker: tuple[int, ...]
    """How many of ``images`` each marker stands for: 1 for an image, its frames for a video."""

    turns: tuple[Turn, ...]
    source: Path


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used, and why."""

    source: Path
    number: int
    id: str | None
    cause: str

    def __str__(self) -> str:
        name = "" if self.id is None else f" (id {self.id})"
        text = f"{self.source}, record {self.number}{name}: {self.cause}"
        return text.encode("utf-8", "backslashreplace").decode()


class SampleError(ValueError):
    """A bad record; ``bad`` says which and why (None if the error crossed a process)."""

    def __init__(self, message: str, bad: BadRecord | None = None) -> None:
        # One required argument: a loader's worker process rebuilds the error from its message.
        super().__init__(message)
        self.bad = bad


def bad_record(bad: BadRecord) -> SampleError:
    """The error for one bad record."""
    return SampleError(f"{bad}; correct it, or leave such records out with data.skip_bad=true", bad)
