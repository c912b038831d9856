"""Put images into a rendered text, and keep track of its answers.

All places count characters.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from regate_ds.data.chat.image_text import ImageWriter, Size
from regate_ds.data.chat.render import AnswerPlace, Rendered


@dataclass(frozen=True)
class Written:
    """A record's text with its images written out."""

    text: str
    images: list[tuple[int, int]]
    """Place [start, end) of what stands for each image."""

    patches: list[int]
    """Number of each image's patches."""

    answers: list[AnswerPlace]
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
    texts, changes, place = images.texts(sizes), [], 0
    for piece, text in zip(pieces, texts):
        start = place + len(piece)
        place = start + len(images.placeholder)
        changes.append((start, place, text))
    shown = len(changes)
    if ending is not None:
        changes += [(answer.end, answer.closed, ending) for answer in rendered.answers]
    text, moves = _change(rendered.text, sorted(changes))

    def moved(place: int) -> int:
        return place + moves[bisect_right(moves, (place, sys.maxsize)) - 1][1]

    return Written(
        text=text,
        images=[(moved(start), moved(end)) for start, end, _ in changes[:shown]],
        patches=[own.count(images.patch) for own in texts],
        answers=[
            replace(a, start=moved(a.start), end=moved(a.end), closed=moved(a.closed))
            for a in rendered.answers
        ],
        sizes=sizes,
    )


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
