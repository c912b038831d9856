"""Records of LLaVA-format data: what was said, and which images belong to it; and bad records."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from regate_ds.algorithm.batch import SampleKey
from regate_ds.data.llava.media import ImageSource

MARKER = re.compile("<image>|<video>")
"""Finds the markers in a question, which show the place of an image or a video."""


@dataclass(frozen=True)
class Turn:
    """One question with its answer."""

    question: str
    """The file's text, with ``<image>`` and ``<video>`` still in it."""

    answer: str

    gold_spans: tuple[tuple[int, int], ...] = ()
    """[start, end) in the answer's characters: words that only the image can tell."""

    learn: bool = True
    """False: the answer is read, but has no labels."""

    results: tuple[str, ...] = ()
    """What tools return, in the place of a question: messages, as JSON."""

    calls: str | None = None
    """The answer if it calls tools, in the place of its text: a message, as JSON."""


@dataclass(frozen=True)
class Record:
    """One checked sample of a data set."""

    key: SampleKey
    id: str | None
    """The file's own id, for messages only: public files repeat or omit it."""

    images: tuple[ImageSource, ...]
    """All images in the order of their markers in the text; a video gives its frames, in the order
    of the numbers in their names."""

    images_per_marker: tuple[int, ...]
    """Number of ``images`` of each marker: 1 for an image, the number of frames for a video."""

    turns: tuple[Turn, ...]
    source: Path
    """The data file."""

    system: str | None = None
    """The record's own system text; None leaves it to the template."""

    tools: str | None = None
    """The tools that the model may call, as JSON."""

    @property
    def uses_tools(self) -> bool:
        return self.tools is not None or any(turn.calls or turn.results for turn in self.turns)


class Cause(ValueError):
    """The reason why one record is bad; it becomes a SampleError or a BadRecord."""


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
        # An id, or the name of a file, may hold the end of a line.
        return " ".join(text.splitlines()).encode("utf-8", "backslashreplace").decode()


class SampleError(ValueError):
    """The error for a bad record; ``bad`` is None if the error came from another process."""

    def __init__(self, message: str, bad: BadRecord | None = None) -> None:
        # One required argument: a loader's worker process rebuilds the error from its message.
        super().__init__(message)
        self.bad = bad


def bad_record(bad: BadRecord) -> SampleError:
    """Make the error for one bad record."""
    return SampleError(f"{bad}; correct it, or leave such records out with data.skip_bad=true", bad)


def describe(record: Record, cause: str) -> BadRecord:
    """Describe why a record that was read without fault cannot be used."""
    return BadRecord(record.source, record.key[1], record.id, cause)
