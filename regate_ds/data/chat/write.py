"""Put images into a rendered text, and keep track of its answers.

A run of patches is one token of text, and repeated behind the tokenizer, which reads each special
token by itself: the tokens are the same, and an image may have thousands. All places count
characters.
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from regate_ds.data.chat.image_text import ImageWriter, Size
from regate_ds.data.chat.render import AnswerPlace, Rendered


@dataclass(frozen=True)
class Written:
    """A record's text with its images written out."""

    text: str
    images: list[tuple[int, int]]
    """Place [start, end) of what stands for each image."""

    runs: list[tuple[int, ...]]
    """For each image the number of patches of each run, which is one token in the text."""

    answers: list[AnswerPlace | None]
    sizes: list[Size]


def write(
    rendered: Rendered, images: ImageWriter, sizes: list[Size], *, ending: str | None = None
) -> Written:
    """Write a record's images out.

    ending: what is to end each answer in the place of the template's own token; None keeps that.
    ValueError if the text has another number of images, or one cannot have its size.
    """
    pieces = rendered.text.split(images.placeholder)
    if len(pieces) - 1 != len(sizes):
        raise ValueError(
            f"the chat template writes {len(pieces) - 1} images of its {len(sizes)}; set "
            "data.template"
        )
    shortened = [_shortened(text, images.patch) for text in images.texts(sizes)]
    changes, place = [], 0
    for piece, (text, _) in zip(pieces, shortened):
        start = place + len(piece)
        place = start + len(images.placeholder)
        changes.append((start, place, text))
    shown = len(changes)
    if ending is not None:
        changes += [(one.end, one.closed, ending) for one in rendered.answers if one is not None]
    text, moves = _change(rendered.text, sorted(changes))

    def moved(place: int) -> int:
        return place + moves[bisect_right(moves, (place, sys.maxsize)) - 1][1]

    return Written(
        text=text,
        images=[(moved(start), moved(end)) for start, end, _ in changes[:shown]],
        runs=[runs for _, runs in shortened],
        answers=[
            a and replace(a, start=moved(a.start), end=moved(a.end), closed=moved(a.closed))
            for a in rendered.answers
        ],
        sizes=sizes,
    )


@lru_cache(maxsize=4096)
def _shortened(text: str, patch: str) -> tuple[str, tuple[int, ...]]:
    """Return a text with each run of patches as one, and the length of each run."""
    one = re.escape(patch)
    runs = [len(run.group()) // len(patch) for run in re.finditer(f"(?:{one})+", text)]
    return re.sub(f"(?:{one})+", lambda _: patch, text), tuple(runs)


def _change(
    text: str, changes: Sequence[tuple[int, int, str]]
) -> tuple[str, list[tuple[int, int]]]:
    """Put each text in the place of [start, end), in rising order.

    Also returns from which place on the old text is moved, and by how much.
    """
    pieces: list[str] = []
    moves, last = [(0, 0)], 0
    for start, end, new in changes:
        pieces += [text[last:start], new]
        moves.append((end, moves[-1][1] + len(new) - (end - start)))
        last = end
    return "".join([*pieces, text[last:]]), moves
