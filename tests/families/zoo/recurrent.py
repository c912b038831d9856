"""Layers that carry a state along a row: each row's kept tokens run alone, one after the other.

Shapes: B rows, T positions, K kept positions of one row, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

STREAMS = ("position_embeddings", "hidden_states", "original_hidden_states", "activations")
"""Names of what a layer is given for each token [..., T, H]."""

_NAMES = re.compile(
    "mamba|delta|shortconv|lightning|linearattention|recurrent|conv1d$|rwkv|lstm|mixer2", re.I
)


def is_recurrent(layer: nn.Module) -> bool:
    """Return whether a decoder layer has a state, or a convolution, along the row."""
    return any(_NAMES.search(type(m).__name__) and type(m).__name__ != "Conv1D" for m in _of(layer))


def _of(layer: nn.Module) -> list[nn.Module]:
    return [module for module in layer.modules() if module is not layer]


def run_rows_alone(
    forward: Callable[..., Any], given: dict[str, Any], kept_BT: Tensor
) -> Tensor | tuple[Any, ...]:
    """Return the layer's results [B, T, H]; elided positions keep their residual."""
    x_BTH, rows, rest = next(iter(given.values())), [], None
    for row, kept_T in enumerate(kept_BT):
        kept_K = kept_T.nonzero().squeeze(1)
        y = forward(**{name: _of_row(name, value, row, kept_K) for name, value in given.items()})
        if isinstance(y, tuple):
            y, rest = y[0], y[1:]
        rows.append(x_BTH[row].index_copy(0, kept_K, y[0]))
    joined = torch.stack(rows)
    return joined if rest is None else (joined, *rest)


def _of_row(name: str, value: Any, row: int, kept_K: Tensor) -> Any:
    """Select what one row's kept tokens are given; what the layer is told of no token stays."""
    if isinstance(value, dict):
        return {key: _of_row(name, one, row, kept_K) for key, one in value.items()}
    if name.endswith("mask"):
        if value is None or value.dim() == 2:
            return None
        return value[row % len(value)][None][..., kept_K, :][..., kept_K]
    if name == "position_embeddings" and isinstance(value, tuple):
        return tuple(_of_row(name, one, row, kept_K) for one in value)
    if name in STREAMS:
        return None if value is None else _row(value, -3, row).index_select(-2, kept_K)
    if name == "position_ids" and value is not None:
        return _row(value, -2, row).index_select(-1, kept_K)
    return value


def _row(value: Tensor, dim: int, row: int) -> Tensor:
    return value.narrow(dim, row % value.shape[dim], 1)
