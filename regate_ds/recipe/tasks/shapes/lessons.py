"""What the phases of the student learn from: pictures with more shapes than the data set's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from random import Random

from PIL import Image

from regate_ds.recipe.tasks.pretraining.lessons import Cells, Lessons, Notes
from regate_ds.recipe.tasks.shapes.scenes import (
    COLOURS,
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
    Scene,
    Shown,
    neighbours,
)

_CELLS = range(len(ROWS) * len(COLUMNS))

_FULL_SHARE = 0.9
"""Share of the cells that hold a shape in the tower's own phase."""

_FEWEST = 3
"""Smallest number of shapes in the pictures of the other phases."""

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
    """Put shapes into about as many cells as in a picture of the data set, or more."""
    return _filled(sorted(rng.sample(_CELLS, rng.randint(_FEWEST, len(_CELLS)))), rng)


def notes(cells: Cells, rng: Random) -> Notes:
    """Return words on some shapes of a picture, each with whether it must be read from the image.

    A note names a shape, by words that the picture shows once or by its place, and adds the rest in
    fixed order; or it names the place beside a shape, and adds what stands there.
    """
    scene = [placed.shown for placed in cells.values()]
    words: Notes = []
    for shown in rng.sample(scene, min(_MOST_NOTES, len(scene))):
        given, seen = _named(shown, scene, rng)
        words += [(f" {word}", False) for word in given]
        words += [*((f" {word}", True) for word in seen), (".", False)]
    return words


def _named(shown: Shown, scene: Scene, rng: Random) -> tuple[Sequence[str], Sequence[str]]:
    """Draw what a note names, and return it with what the note adds."""
    by_word: list[tuple[Sequence[str], Sequence[str]]] = []
    if [other.shape for other in scene].count(shown.shape) == 1:
        by_word.append(((shown.shape,), shown[1:]))
    if [other.colour for other in scene].count(shown.colour) == 1:
        by_word.append(((shown.colour,), (shown.shape, *shown[2:])))
    # One word is found sooner than two, so such notes teach the student to look.
    if by_word and rng.random() < 0.5:
        return rng.choice(by_word)
    name = shown.name.split()
    if [other.name for other in scene].count(shown.name) > 1 or rng.random() < 0.5:
        return shown[4:], shown[:4]
    beside = list(neighbours(scene, shown).items())
    if not beside or rng.random() < 0.5:
        return name, shown[2:]
    relation, other = rng.choice(beside)
    return [*relation.split(), *name], other[:4]


@cache
def _pairs() -> list[tuple[str, str]]:
    return pairs_of("train")


def _filled(cells: list[int], rng: Random) -> Cells:
    return {cell: place(rng.choice(_pairs()), cell, rng) for cell in cells}


def _words_of(placed: Placed) -> tuple[str, ...]:
    return placed.shown[:4]


def _render(cells: Cells) -> Image.Image:
    return render(cells.values())
