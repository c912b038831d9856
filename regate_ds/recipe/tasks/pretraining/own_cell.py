"""How a fresh tower starts out: each patch looks at the patches of its own cell, a head at each.

A patch shows a piece of a stroke; which digit it is shows only in all patches of a cell together.
From random weights a tower takes long to find out which patches belong together. These weights
say it from the first step on, and training may change every one of them.

A patch's position embedding holds four codes, each in dimensions of its own: row and column of its
cell in the grid, row and column of the patch in its cell. A head's queries and keys compare the
codes of the cells, and its keys prefer the one patch of a cell that the head looks at.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regate_ds.recipe.tasks.pretraining.lessons import Lessons

_CODE = 2.3
"""Length of a code in a position embedding; four of them are about as long as a patch's pixels."""

_MARGIN = 9.0
"""By how much a logit falls when one of the four codes is another than the head looks for."""


@torch.no_grad()
def look_at_own_cell(tower: Any, lessons: Lessons) -> None:
    """Set position embeddings, queries and keys of a fresh CLIP tower as this file describes.

    ValueError if a layer's heads are not as many as the patches of a cell, or have no room for
    the codes of the grid.
    """
    config = tower.config
    side = config.image_size // config.patch_size
    high, wide = lessons.patches_of_cell(side)
    if config.num_attention_heads != high * wide:
        raise ValueError(
            f"{config.num_attention_heads} heads for {high * wide} patches of a cell; set "
            f"num_attention_heads={high * wide}, so that there is a head for each patch"
        )
    line = torch.arange(side)
    row, column = line.repeat_interleave(side), line.repeat(side)
    grid = lessons.grid
    codes = [
        _simplex(grid[0])[row // high],
        _simplex(grid[1])[column // wide],
        _simplex(high)[row % high],
        _simplex(wide)[column % wide],
    ]
    code_PD = torch.cat(codes, dim=1)
    num_codes = code_PD.shape[1]
    # Nothing else is written in the dimensions of the codes.
    tower.embeddings.patch_embedding.weight[:num_codes] = 0
    tower.embeddings.position_embedding.weight[:, :num_codes] = 0
    tower.embeddings.position_embedding.weight[1:, :num_codes] = _CODE * code_PD
    for layer in tower.encoder.layers:
        _compare_codes(layer.self_attn, config.hidden_size, grid, (high, wide))


def _compare_codes(
    attention: Any, hidden: int, grid: tuple[int, int], in_cell: tuple[int, int]
) -> None:
    """Let head h look at patch h of the own cell; its spare dimensions keep their weights."""
    # A normed state has length sqrt(hidden); the codes are half of its energy, in four equal parts.
    code = math.sqrt(hidden / 8)
    scale = _MARGIN * math.sqrt(attention.head_dim)
    gains = [math.sqrt(scale / _apart(number)) / code for number in grid for _ in range(number - 1)]
    bias = math.sqrt(scale / _apart(in_cell[0]) / code)
    # The query's bias serves both codes of the patch, so the second key makes up for its size.
    own = [_simplex(in_cell[0]), _apart(in_cell[0]) / _apart(in_cell[1]) * _simplex(in_cell[1])]
    num_cell = len(gains)
    for head in range(attention.num_heads):
        first = head * attention.head_dim
        compared = slice(first, first + num_cell + 1)
        for linear in (attention.q_proj, attention.k_proj):
            linear.weight[compared], linear.bias[compared] = 0, 0
            linear.weight[first : first + num_cell, :num_cell] = torch.diag(torch.tensor(gains))
        attention.q_proj.bias[first + num_cell] = bias
        row, column = divmod(head, in_cell[1])
        wanted = torch.cat([own[0][row], own[1][column]])
        attention.k_proj.weight[first + num_cell, num_cell : num_cell + len(wanted)] = bias * wanted


def _apart(number: int) -> float:
    """Return by how much a code's product with itself is above that with another of as many.

    Two codes of n have a product of 1 if they are one, else of -1 / (n - 1).
    """
    return number / (number - 1)


def _simplex(number: int) -> Tensor:
    """Return that many unit vectors, each two equally far apart: [number, number - 1]."""
    corners, _, _ = torch.linalg.svd(torch.eye(number) - 1 / number)
    return F.normalize(corners[:, : number - 1], dim=1)
