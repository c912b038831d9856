"""The phases of a student that learn from digit scenes whose content is known.

    tower    tell the digit, colour, size and place of each cell of the grid
    words    map each cell's features to the directions in which the backbone tells words apart

Scenes are drawn during training, from the training part's digits. They are more crowded than those
of the data set, so that nearly every cell teaches something.

Shapes: B scenes, C cells, P patches of an image (X of a cell), F features of the tower, H hidden,
N patches, V kinds of words.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from regate_ds.recipe.students.student import Student
from regate_ds.recipe.tasks.digits.own_cell import look_at_own_cell
from regate_ds.recipe.tasks.digits.phase import PhaseConfig, optimise
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

_CHOICES = (DIGITS, tuple(COLOURS), tuple(SIZES), ROWS, COLUMNS)
"""Words that describe a cell, by kind; an empty cell is one more choice of all but the last two."""

_PLACES = [(row, column) for row in ROWS for column in COLUMNS]
"""Row and column of the cells 0 to 8."""

_MOST_SCENES = 5
"""Largest number of scenes laid over each other; where two have a digit, the later one stays."""

_FULL_SHARE = 0.9
"""Share of the cells that hold a digit in the tower's own phase."""

Cells = dict[int, Placed]
"""A scene: what stands in each of the cells 0 to 8 that is not empty."""


def learn_scenes(student: Student, phase: PhaseConfig, *, seed: int) -> None:
    """Train a fresh tower to tell at every patch what stands in its cell.

    It learns through heads that are then discarded.
    """
    tower = student.model.model.vision_tower.train()
    look_at_own_cell(tower)
    config = student.model.config.vision_config
    side = config.image_size // config.patch_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = nn.ModuleList(nn.Linear(config.hidden_size, len(words) + 1) for words in _CHOICES)
    part = Split("train", handwritten("train"), seed, None)

    def loss(rng: Random) -> Tensor:
        scenes = [_full_scene(part, rng) for _ in range(phase.batch)]
        features_NF = _by_cell(_features(student, scenes), side).flatten(0, 2)
        truth_BCV = torch.tensor([_truth(cells) for cells in scenes])
        truth_NV = truth_BCV.flatten(0, 1).repeat_interleave((side // 3) ** 2, dim=0)
        losses = [
            F.cross_entropy(head(features_NF), truth_NV[:, x]) for x, head in enumerate(heads)
        ]
        return torch.stack(losses).sum()

    optimise("vision tower", nn.ModuleList([tower, heads]), loss, phase, seed)


def learn_words(student: Student, phase: PhaseConfig, *, num_scenes: int, seed: int) -> None:
    """Train the projector alone to turn a patch into the sum of its cell's word directions.

    ``phase.batch`` counts patches. The tower runs once over each of ``num_scenes`` scenes.
    """
    config = student.model.config.vision_config
    side = config.image_size // config.patch_size
    part = Split("train", handwritten("train"), seed, None)
    rng = Random(seed)
    scenes = [crowded_scene(part, rng) for _ in range(num_scenes)]
    with torch.no_grad():
        batches = [scenes[i : i + 64] for i in range(0, num_scenes, 64)]
        features_NF = torch.cat([_features(student, batch).flatten(0, 1) for batch in batches])
        wanted_NH = torch.cat([_words(student, cells, side) for cells in scenes])
    size = wanted_NH.square().sum(dim=1).mean()
    projector = student.model.model.multi_modal_projector

    def loss(rng: Random) -> Tensor:
        rows = torch.tensor(rng.choices(range(len(features_NF)), k=phase.batch))
        error_NH = projector(features_NF[rows]) - wanted_NH[rows]
        return error_NH.square().sum(dim=1).mean() / size

    optimise("projector on words", projector, loss, phase, seed)


def crowded_scene(part: Split, rng: Random) -> Cells:
    """Lay one or several scenes over each other."""
    cells: Cells = {}
    for _ in range(rng.randint(1, _MOST_SCENES)):
        for placed in draw_scene(part, rng):
            cells[_cell(placed.shown)] = placed
    return cells


def _full_scene(part: Split, rng: Random) -> Cells:
    """Put a digit into nearly every cell."""
    filled = [cell for cell in range(9) if rng.random() < _FULL_SHARE]
    return {cell: place(part, rng.randrange(10), cell, rng) for cell in filled}


def _cell(shown: Shown) -> int:
    return 3 * ROWS.index(shown.row) + COLUMNS.index(shown.column)


def _features(student: Student, scenes: list[Cells]) -> Tensor:
    """Return the tower's patch features [B, P, F], without the class token."""
    images: list[Image.Image] = [render(list(cells.values())) for cells in scenes]
    tower: Any = student.model.model.vision_tower
    return tower(**student.vision.pixels(images)).last_hidden_state[:, 1:]


def _by_cell(patches_BPF: Tensor, side: int) -> Tensor:
    """Group the patches by the 3 x 3 cells: [B, C, X, F]."""
    batch, _, features = patches_BPF.shape
    in_cell = side // 3
    grid = patches_BPF.view(batch, 3, in_cell, 3, in_cell, features)
    return grid.transpose(2, 3).reshape(batch, 9, in_cell * in_cell, features)


def _truth(cells: Cells) -> list[list[int]]:
    """Return the numbers of each cell's choices; an empty cell has the last of the first three."""
    nothing = [len(words) for words in _CHOICES[:3]]
    truth = [[*nothing, *divmod(cell, 3)] for cell in range(9)]
    for cell, placed in cells.items():
        truth[cell] = [words.index(word) for words, word in zip(_CHOICES, placed.shown)]
    return truth


def _words(student: Student, cells: Cells, side: int) -> Tensor:
    """Return the sum of its cell's word directions for each patch of a scene: [P, H].

    An empty cell has the words of its place. With a target of zero its token would be noise, which
    the decoder's first norm makes as large as any other token.
    """
    directions = _directions(student)
    words_CH = torch.stack([directions[row] + directions[column] for row, column in _PLACES])
    for cell, placed in cells.items():
        for word in placed.shown[:3]:
            words_CH[cell] += directions[word]
    in_cell = side // 3
    grid = words_CH.view(3, 1, 3, 1, -1).expand(3, in_cell, 3, in_cell, -1)
    return grid.reshape(side * side, -1)


def _directions(student: Student) -> dict[str, Tensor]:
    """Return how each word's embedding differs from the others of its kind, as long as a word.

    Text alone hardly tells the words of a kind apart: they share most of their embeddings.
    """
    embeddings: Any = student.model.get_input_embeddings()
    embedding = embeddings.weight.detach()
    length = embedding.norm(dim=1).mean()
    directions: dict[str, Tensor] = {}
    for words in _CHOICES:
        # A word has its space, as inside a sentence; one of several tokens is their mean.
        ids = [student.tokenizer(f" {w}", add_special_tokens=False)["input_ids"] for w in words]
        own = torch.stack([embedding[tokens].mean(dim=0) for tokens in ids])
        own = F.normalize(own - own.mean(dim=0), dim=1) * length
        directions |= dict(zip(words, own))
    return directions
