"""The words that tell a picture of shapes, and where its shapes stand to each other."""

from __future__ import annotations

from typing import NamedTuple

SHAPES = ("circle", "square", "diamond", "triangle", "star", "cross")
FILLS = ("solid", "hollow", "striped")
ROWS = ("top", "bottom")
COLUMNS = ("first", "second", "third", "fourth", "fifth")
COUNT_WORDS = ("none", "one", "two", "three", "four", "five", "six")
COMPARED = ("smaller", "equal", "greater")

RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
"""Where the next shape stands, seen from a shape: steps down and to the right."""


class Shown(NamedTuple):
    """One shape of a picture, in the words of the answers."""

    shape: str
    colour: str
    fill: str
    size: str
    row: str
    column: str

    @property
    def name(self) -> str:
        """Return what singles a shape of the data set out: no other of its picture has both."""
        return f"{self.colour} {self.shape}"

    @property
    def cell(self) -> tuple[int, int]:
        return ROWS.index(self.row), COLUMNS.index(self.column)


Scene = list[Shown]
"""The shapes of a picture in reading order."""


def names(scene: Scene, shown: Shown) -> list[str]:
    """Return what singles a shape out: its name, and one word of it that no other shape has."""
    found = [shown.name]
    if [other.shape for other in scene].count(shown.shape) == 1:
        found.append(shown.shape)
    if [other.colour for other in scene].count(shown.colour) == 1:
        found.append(f"{shown.colour} shape")
    return found


def neighbours(scene: Scene, shown: Shown) -> dict[str, Shown]:
    """Return by relation the shapes in the next places; empty places have none."""
    by_cell = {each.cell: each for each in scene}
    row, column = shown.cell
    cells = {name: (row + down, column + right) for name, (down, right) in RELATIONS.items()}
    return {name: by_cell[cell] for name, cell in cells.items() if cell in by_cell}


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")
