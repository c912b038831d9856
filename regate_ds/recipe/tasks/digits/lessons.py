"""What the phases of the student learn from: scenes of digits, more crowded than the data set's."""

from __future__ import annotations

from random import Random

from PIL import Image

from regate_ds.recipe.tasks.digits.questions import COLUMNS, DIGITS, ROWS, Shown
from regate_ds.recipe.tasks.digits.scenes import (
    COLOURS,
    SIZES,
    Placed,
    Split,
    draw_scene,
    handwritten,
    place,
    render,
)
from regate_ds.recipe.tasks.pretraining.lessons import Cells, Lessons, Notes

_MOST_SCENES = 5
"""Largest number of scenes laid over each other; where two have a digit, the later one stays."""

_FULL_SHARE = 0.9
"""Share of the cells that hold a digit in the tower's own phase."""

_MOST_NOTES = 6
"""Largest number of notes on a scene, so that rows have about the same length."""

_BY_PLACE = ("row", "column", "digit", "colour", "size")
_BY_DIGIT = ("digit", "colour", "size", "row", "column")


def digits_lessons() -> Lessons:
    """Return the lessons of handwritten digits that the training part shows."""
    return Lessons(
        kinds=(DIGITS, tuple(COLOURS), tuple(SIZES)),
        rows=ROWS,
        columns=COLUMNS,
        words_of=_words_of,
        render=_render,
        full=full_scene,
        crowded=crowded_scene,
        notes=notes,
    )


def crowded_scene(rng: Random) -> Cells:
    """Lay one or several scenes over each other."""
    cells: Cells = {}
    for _ in range(rng.randint(1, _MOST_SCENES)):
        for placed in draw_scene(_part(), rng):
            cells[_cell(placed.shown)] = placed
    return cells


def full_scene(rng: Random) -> Cells:
    """Put a digit into nearly every cell."""
    filled = [cell for cell in range(9) if rng.random() < _FULL_SHARE]
    return {cell: place(_part(), rng.randrange(10), cell, rng) for cell in filled}


def notes(cells: Cells, rng: Random) -> Notes:
    """Return words on some cells of a scene, each with whether it must be read from the image.

    A note names a place, or a digit that the scene shows once, and adds the rest in fixed order.
    """
    shown = [placed.shown for placed in cells.values()]
    digits = [each.digit for each in shown]
    words: Notes = []
    for each in rng.sample(shown, min(_MOST_NOTES, len(shown))):
        by_digit = digits.count(each.digit) == 1 and rng.random() < 0.5
        words += _note(each, *((_BY_DIGIT, 1) if by_digit else (_BY_PLACE, 2)))
    return words


def _note(shown: Shown, order: tuple[str, ...], num_given: int) -> Notes:
    words = [(f" {getattr(shown, name)}", i >= num_given) for i, name in enumerate(order)]
    return [*words, (".", False)]


def _part() -> Split:
    # Only the data set's own files depend on a seed; here the generator is given.
    return Split("train", handwritten("train"), 0, None)


def _cell(shown: Shown) -> int:
    return 3 * ROWS.index(shown.row) + COLUMNS.index(shown.column)


def _words_of(placed: Placed) -> tuple[str, ...]:
    return placed.shown[:3]


def _render(cells: Cells) -> Image.Image:
    return render(list(cells.values()))
