"""The phases of a student that learn from pictures whose content is known.

    tower    tell what stands in each cell of the grid, and the cell's place
    words    map each cell's features to the directions in which the backbone tells words apart

Pictures are drawn during training. They are more crowded than those of the data set, so that
nearly every cell teaches something.

Shapes: B pictures, C cells, P patches of an image (X of a cell), F features of the tower, H hidden,
N patches, V kinds of words.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regate_ds.recipe.students.student import Student
from regate_ds.recipe.tasks.pretraining.lessons import Cells, Lessons
from regate_ds.recipe.tasks.pretraining.own_cell import look_at_own_cell
from regate_ds.recipe.tasks.pretraining.phase import PhaseConfig, optimise


def learn_scenes(student: Student, lessons: Lessons, phase: PhaseConfig, *, seed: int) -> None:
    """Train a fresh tower to tell at every patch what stands in its cell.

    It learns through heads that are then discarded.
    """
    tower = student.model.model.vision_tower.train()
    look_at_own_cell(tower, lessons)
    config = student.model.config.vision_config
    side = config.image_size // config.patch_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        choices = [len(words) + 1 for words in _choices(lessons)]
        heads = nn.ModuleList(nn.Linear(config.hidden_size, number) for number in choices)
    high, wide = lessons.patches_of_cell(side)

    def loss(rng: Random) -> Tensor:
        pictures = [lessons.full(rng) for _ in range(phase.batch)]
        features_NF = _by_cell(_features(student, lessons, pictures), lessons, side).flatten(0, 2)
        truth_BCV = torch.tensor([_truth(lessons, cells) for cells in pictures])
        truth_NV = truth_BCV.flatten(0, 1).repeat_interleave(high * wide, dim=0)
        losses = [
            F.cross_entropy(head(features_NF), truth_NV[:, x]) for x, head in enumerate(heads)
        ]
        return torch.stack(losses).sum()

    optimise("vision tower", nn.ModuleList([tower, heads]), loss, phase, seed)


def learn_words(
    student: Student, lessons: Lessons, phase: PhaseConfig, *, num_scenes: int, seed: int
) -> None:
    """Train the projector alone to turn a patch into the sum of its cell's word directions.

    ``phase.batch`` counts patches. The tower runs once over each of ``num_scenes`` pictures.
    """
    config = student.model.config.vision_config
    side = config.image_size // config.patch_size
    rng = Random(seed)
    pictures = [lessons.crowded(rng) for _ in range(num_scenes)]
    with torch.no_grad():
        batches = [pictures[i : i + 64] for i in range(0, num_scenes, 64)]
        features = [_features(student, lessons, batch).flatten(0, 1) for batch in batches]
        features_NF = torch.cat(features)
        wanted_NH = torch.cat([_words(student, lessons, cells, side) for cells in pictures])
    size = wanted_NH.square().sum(dim=1).mean()
    projector = student.model.model.multi_modal_projector

    def loss(rng: Random) -> Tensor:
        rows = torch.tensor(rng.choices(range(len(features_NF)), k=phase.batch))
        error_NH = projector(features_NF[rows]) - wanted_NH[rows]
        return error_NH.square().sum(dim=1).mean() / size

    optimise("projector on words", projector, loss, phase, seed)


def _choices(lessons: Lessons) -> tuple[tuple[str, ...], ...]:
    """Return the words that describe a cell, by kind: of what stands in it, then of its place.

    A thing of no word, an empty cell, is one more choice of the first.
    """
    return (*lessons.kinds, lessons.rows, lessons.columns)


def _features(student: Student, lessons: Lessons, pictures: list[Cells]) -> Tensor:
    """Return the tower's patch features [B, P, F], without the class token."""
    images = [lessons.render(cells) for cells in pictures]
    tower: Any = student.model.model.vision_tower
    return tower(**student.vision.pixels(images)).last_hidden_state[:, 1:]


def _by_cell(patches_BPF: Tensor, lessons: Lessons, side: int) -> Tensor:
    """Group the patches by the cells of the grid: [B, C, X, F]."""
    batch, _, features = patches_BPF.shape
    (high, wide), (rows, columns) = lessons.patches_of_cell(side), lessons.grid
    grid = patches_BPF.view(batch, rows, high, columns, wide, features)
    return grid.transpose(2, 3).reshape(batch, -1, high * wide, features)


def _truth(lessons: Lessons, cells: Cells) -> list[list[int]]:
    """Return the numbers of each cell's choices; what an empty cell holds is the last of each."""
    nothing = [len(words) for words in lessons.kinds]
    rows, columns = lessons.grid
    truth: list[list[int]] = []
    for cell in range(rows * columns):
        held = nothing
        if cell in cells:
            words = lessons.words_of(cells[cell])
            held = [kind.index(word) for kind, word in zip(lessons.kinds, words)]
        truth.append([*held, *divmod(cell, columns)])
    return truth


def _words(student: Student, lessons: Lessons, cells: Cells, side: int) -> Tensor:
    """Return the sum of its cell's word directions for each patch of a picture: [P, H].

    An empty cell has the words of its place. With a target of zero its token would be noise, which
    the decoder's first norm makes as large as any other token.
    """
    directions = _directions(student, lessons)
    places = [directions[row] + directions[column] for row, column in lessons.places]
    words_CH = torch.stack(places)
    for cell, thing in cells.items():
        for word in lessons.words_of(thing):
            words_CH[cell] += directions[word]
    (high, wide), (rows, columns) = lessons.patches_of_cell(side), lessons.grid
    grid = words_CH.view(rows, 1, columns, 1, -1).expand(rows, high, columns, wide, -1)
    return grid.reshape(side * side, -1)


def _directions(student: Student, lessons: Lessons) -> dict[str, Tensor]:
    """Return how each word's embedding differs from the others of its kind, as long as a word.

    Text alone hardly tells the words of a kind apart: they share most of their embeddings.
    """
    embeddings: Any = student.model.get_input_embeddings()
    embedding = embeddings.weight.detach()
    length = embedding.norm(dim=1).mean()
    directions: dict[str, Tensor] = {}
    for words in _choices(lessons):
        # A word has its space, as inside a sentence; one of several tokens is their mean.
        ids = [student.tokenizer(f" {w}", add_special_tokens=False)["input_ids"] for w in words]
        own = torch.stack([embedding[tokens].mean(dim=0) for tokens in ids])
        own = F.normalize(own - own.mean(dim=0), dim=1) * length
        directions |= dict(zip(words, own))
    return directions
