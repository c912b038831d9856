"""What the phases of the student learn from: pictures with more shapes than the data set's."""

from __future__ import annotations

from functools import cache
from random import Random

from PIL import Image

from regate_ds.recipe.tasks.pretraining.lessons import Cells, Lessons, Notes
from regate_ds.recipe.tasks.shapes.scenes import (
    COLOURS,
    FEWEST,
    SIZES,
    Placed,
    pairs_of,
    place,
    render,
)
from regate_ds.recipe.tasks.shapes.words import (
    COLUMNS,
    FILLS,
    ROWS,
    SHAPES,
    neighbours,
)

_CELLS = range(len(ROWS) * len(COLUMNS))

_FULL_SHARE = 0.9
"""Share of the cells that hold a shape in the tower's own phase."""

_MOST_NOTES = 6
"""Largest number of notes on a picture, so that rows have about the same length."""


def shapes_lessons() -> Lessons:
    """Return the lessons of shapes, in the pairs of shape and colour that training shows."""
    return Lessons(
        kinds=(SHAPES, tuple(COLOURS), FILLS, tuple(SIZES)),
        rows=ROWS,
        columns=COLUMNS,
        words_of=_words_of,
        render=_render,
        full=full_picture,
        crowded=crowded_picture,
        notes=notes,
    )


def full_picture(rng: Random) -> Cells:
    """Put a shape into nearly every cell."""
    return _filled([cell for cell in _CELLS if rng.random() < _FULL_SHARE], rng)


def crowded_picture(rng: Random) -> Cells:
    """Put shapes into as many cells as in a picture of the data set, or more."""
    return _filled(sorted(rng.sample(_CELLS, rng.randint(FEWEST, len(_CELLS)))), rng)


def notes(cells: Cells, rng: Random) -> Notes:
    """Return words on some shapes of a picture, each with whether it must be read from the image.

    A note names a place, a shape and its colour that the picture shows once, or the place beside
    such a shape, and adds what stands there.
    """
    scene = [placed.shown for placed in cells.values()]
    names = [shown.name for shown in scene]
    words: Notes = []
    for shown in rng.sample(scene, min(_MOST_NOTES, len(scene))):
        beside = neighbours(scene, shown) if names.count(shown.name) == 1 else {}
        draw = rng.random()
        if beside and draw < 0.4:
            relation, other = rng.choice(list(beside.items()))
            words += _note([*relation.split(), *shown.name.split()], other[:4])
        elif names.count(shown.name) == 1 and draw < 0.7:
            words += _note(shown.name.split(), shown[4:] + shown[2:4])
        else:
            words += _note(shown[4:], shown[:4])
    return words


def _note(given: list[str] | tuple[str, ...], seen: tuple[str, ...]) -> Notes:
    named = [(f" {word}", False) for word in given]
    return [*named, *((f" {word}", True) for word in seen), (".", False)]


@cache
def _pairs() -> list[tuple[str, str]]:
    return pairs_of("train")


def _filled(cells: list[int], rng: Random) -> Cells:
    return {cell: place(rng.choice(_pairs()), cell, rng) for cell in cells}


def _words_of(placed: Placed) -> tuple[str, ...]:
    return placed.shown[:4]


def _render(cells: Cells) -> Image.Image:
    return render(cells.values())
