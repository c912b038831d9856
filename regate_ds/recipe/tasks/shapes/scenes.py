"""A small visual question set of drawn shapes, in LLaVA format.

Four to six shapes stand in two rows of five places, each with a colour, a fill and a size;
questions.py asks how they stand to each other and how many there are. Some pairs of shape and
colour are shown in the test part only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageDraw

from regate_ds.recipe.tasks.files import conversation, save_image, write_parts
from regate_ds.recipe.tasks.shapes.questions import ask
from regate_ds.recipe.tasks.shapes.words import COLUMNS, FILLS, ROWS, SHAPES, Shown

SIDE = 100
"""Side of a picture in pixels."""

CELL_HIGH, CELL_WIDE = SIDE // len(ROWS), SIDE // len(COLUMNS)

SIZES = {"small": 13, "large": 19}
"""Side of a shape's square in pixels."""

COLOURS = {
    "red": (215, 40, 40),
    "green": (30, 150, 60),
    "blue": (50, 90, 230),
    "orange": (245, 150, 20),
    "pink": (240, 100, 190),
    "black": (30, 30, 30),
}

PAPER = (225, 220, 205)

HELD_OUT = tuple(zip(SHAPES, COLOURS))
"""Pairs of shape and colour that no training picture shows, nor a picture of the lessons."""

FEWEST, MOST = 4, 6
"""Number of shapes in a picture."""

_VARIETY = 3
"""A picture has so many kinds of shape, and as many colours, so that there is much to count."""

_FINE = 4
"""A shape is drawn so many times larger and then reduced, so that its edges are smooth."""

_TURN = 12
"""A shape is turned by up to so many degrees either way."""

_HOLE = 0.55
"""Size of the hole in a hollow shape, as a share of the shape's."""

_STRIPE = 2
"""Height of a stripe in pixels."""


@dataclass(frozen=True)
class Placed:
    """One shape of a picture: its words, its top left corner in pixels, its turn in degrees."""

    shown: Shown
    top: int
    left: int
    turn: float


def build_shapes(out: Path, *, num_train: int, num_test: int, seed: int) -> None:
    """Write ``out``/train.json and test.json (LLaVA format) and the images they name.

    The same arguments write the same bytes; a record depends on its part, its number and the seed
    alone. Each answer carries its ``gold_spans`` and each record its ``scene``, in the answers'
    words.
    """

    def write(part: str, number: int) -> dict[str, Any]:
        rng = Random(f"{seed} {part} {number}")
        scene = draw_scene(part, rng)
        stem = f"{part}_{number:06d}"
        name = f"images/{stem}.png"
        save_image(render(scene), out / name)
        shown = [placed.shown for placed in scene]
        turns = conversation("image", ask(shown, rng))
        words = [each._asdict() for each in shown]
        return {"id": stem, "image": name, "conversations": turns, "scene": words}

    write_parts(out, {"train": num_train, "test": num_test}, write)


def pairs_of(part: str) -> list[tuple[str, str]]:
    """Return the pairs of shape and colour that pictures of a part may show."""
    pairs = list(product(SHAPES, COLOURS))
    return [pair for pair in pairs if part == "test" or pair not in HELD_OUT]


def draw_scene(part: str, rng: Random) -> list[Placed]:
    """Draw shapes in different places, in reading order; no two have both shape and colour."""
    shapes, colours = rng.sample(SHAPES, _VARIETY), rng.sample(list(COLOURS), _VARIETY)
    allowed = [pair for pair in pairs_of(part) if pair[0] in shapes and pair[1] in colours]
    pairs = rng.sample(allowed, rng.randint(FEWEST, MOST))
    cells = sorted(rng.sample(range(len(ROWS) * len(COLUMNS)), len(pairs)))
    return [place(pair, cell, rng) for pair, cell in zip(pairs, cells)]


def place(pair: tuple[str, str], cell: int, rng: Random) -> Placed:
    """Draw a shape of that kind and colour, of any fill and size, somewhere in a cell, 0 to 9."""
    row, column = divmod(cell, len(COLUMNS))
    size = rng.choice(list(SIZES))
    words = Shown(*pair, rng.choice(FILLS), size, ROWS[row], COLUMNS[column])
    return Placed(
        shown=words,
        top=row * CELL_HIGH + rng.randint(0, CELL_HIGH - SIZES[size]),
        left=column * CELL_WIDE + rng.randint(0, CELL_WIDE - SIZES[size]),
        turn=rng.uniform(-_TURN, _TURN),
    )


def render(scene: Iterable[Placed]) -> Image.Image:
    """Draw a picture as an RGB image of SIDE pixels a side."""
    picture = Image.new("RGB", (SIDE, SIDE), PAPER)
    for placed in scene:
        picture.paste(COLOURS[placed.shown.colour], (placed.left, placed.top), _ink(placed))
    return picture


def _ink(placed: Placed) -> Image.Image:
    """Return how much of each pixel of the shape's square is covered, from 0 to 255."""
    side = SIZES[placed.shown.size] * _FINE
    corners = _outline(placed.shown.shape, placed.turn)
    ink = Image.new("L", (side, side))
    draw = ImageDraw.Draw(ink)
    draw.polygon([(side * (0.5 + x), side * (0.5 + y)) for x, y in corners], fill=255)
    if placed.shown.fill == "hollow":
        inner = [(side * (0.5 + _HOLE * x), side * (0.5 + _HOLE * y)) for x, y in corners]
        draw.polygon(inner, fill=0)
    if placed.shown.fill == "striped":
        for top in range(0, side, 2 * _STRIPE * _FINE):
            draw.rectangle((0, top, side, top + _STRIPE * _FINE - 1), fill=0)
    return ink.resize((side // _FINE, side // _FINE), Image.Resampling.BOX)


def _outline(shape: str, turn: float) -> list[tuple[float, float]]:
    """Return the corners of a shape, turned, as right and down from its middle; its side is 1."""
    angles = [(radius, math.radians(angle + turn)) for radius, angle in _CORNERS[shape]]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for radius, angle in angles]


def _regular(number: int, first: float) -> list[tuple[float, float]]:
    return [(0.5, first + 360 * i / number) for i in range(number)]


_CORNERS: dict[str, list[tuple[float, float]]] = {
    "circle": _regular(36, 0),
    "square": _regular(4, 45),
    "diamond": [(0.5, 0), (0.3, 90), (0.5, 180), (0.3, 270)],
    "triangle": _regular(3, 0),
    "star": [(0.5 if i % 2 == 0 else 0.2, 36.0 * i) for i in range(10)],
    "cross": [
        (radius, 90.0 * arm + angle)
        for arm in range(4)
        for radius, angle in ((0.5, -17), (0.5, 17), (0.2, 45))
    ],
}
"""Corners by shape: distance from the middle, and degrees from the top, clockwise."""
