"""What a task tells the phases of its student: pictures in a grid, and words for what they show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from random import Random
from typing import Any

from PIL import Image

Cells = dict[int, Any]
"""What stands in each cell that is not empty, by the cell's number in reading order."""

Notes = list[tuple[str, bool]]
"""Words on a picture, each with its space, and whether it must be read from the picture."""


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """Pictures that are drawn during training, as crowded as each phase wants them."""

    kinds: tuple[tuple[str, ...], ...]
    """Words for what stands in a cell, by kind."""

    rows: tuple[str, ...]
    """Words for the rows of the grid, from the top."""

    columns: tuple[str, ...]
    """Words for the columns of the grid, from the left."""

    words_of: Callable[[Any], tuple[str, ...]]
    """The words for one thing that stands in a cell, one of each kind."""

    render: Callable[[Cells], Image.Image]
    """Draws a picture; all of them have the size that the tower takes."""

    full: Callable[[Random], Cells]
    """Draws what stands in the cells of a picture for the tower: nearly every cell is used."""

    crowded: Callable[[Random], Cells]
    """Draws the same for the other phases: from about as few things as in the data, to many."""

    notes: Callable[[Cells, Random], Notes]
    """Writes notes, of about the same length for any picture."""

    def __post_init__(self) -> None:
        words = [*chain(*self.kinds), *self.rows, *self.columns]
        twice = sorted({word for word in words if words.count(word) > 1})
        if twice:
            raise ValueError(
                f"{', '.join(twice)}: a word of two kinds would have two meanings in a token; "
                "use another word for one of them"
            )
        rows, columns = self.grid
        if rows < 2 or columns < 2:
            raise ValueError(
                f"a grid of {rows} x {columns} cells; it needs at least 2 rows and 2 columns"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Return the numbers of rows and columns."""
        return len(self.rows), len(self.columns)

    @property
    def places(self) -> list[tuple[str, str]]:
        """Return the words for row and column of each cell."""
        return [(row, column) for row in self.rows for column in self.columns]

    def patches_of_cell(self, side: int) -> tuple[int, int]:
        """Return how many patches a cell is high and wide, in a picture of ``side`` x ``side``."""
        rows, columns = self.grid
        if side % rows or side % columns or side in (rows, columns):
            raise ValueError(
                f"{side} x {side} patches cannot be cut into {rows} x {columns} cells of at least "
                "2 x 2 patches; set image_size and patch_size so that they can"
            )
        return side // rows, side // columns
