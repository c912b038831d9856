"""What a plan's loss is where the MLP branch alone is gated, by the host's own forward.

Each gated layer runs twice on all positions, the second time with an MLP that returns 0. Kept
positions take the first result and elided ones the second. So nothing here knows where a branch
begins or ends; norms behind an MLP return 0 for 0, as none of them has a bias.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.algorithm.plan import ElisionPlan
from tests.families.zoo.oracle import (
    decoder_of,
    kept_positions,
    logits_of,
    replaced,
    summed,
)

MLPS = ("mlp", "feed_forward", "block_sparse_moe", "shared_mlp")
"""Names of an MLP in a decoder layer, experts included."""


def mlp_oracle_loss(
    host: nn.Module, inputs: dict[str, Any], plan: ElisionPlan, gated: range
) -> Tensor:
    """Return the summed loss of the plan's targets."""
    with ExitStack() as stack:
        if plan.moves_rows:
            kept_BT, layers = kept_positions(plan), decoder_of(host).layers
            for number in gated:
                run = _gated(layers[number], kept_BT)
                stack.enter_context(replaced(layers[number], "forward", run))
        logits_BTV = logits_of(host, inputs)
    return summed(logits_BTV, plan.label_position_L, plan.targets_L)


def _gated(layer: Any, kept_BT: Tensor) -> Callable[..., Any]:
    """Return the layer's forward, with an MLP for kept positions only."""
    forward = layer.forward
    mlps = [child for name, child in layer.named_children() if name in MLPS]
    assert mlps

    def run(*args: Any, **kwargs: Any) -> Any:
        y = forward(*args, **kwargs)
        with ExitStack() as stack:
            for mlp in mlps:
                stack.enter_context(replaced(mlp, "forward", _zero(mlp.forward)))
            mixed = forward(*args, **kwargs)
        if isinstance(y, tuple):
            return (torch.where(kept_BT[..., None], y[0], mixed[0]), *y[1:])
        return torch.where(kept_BT[..., None], y, mixed)

    return run


def _zero(mlp: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        y = mlp(*args, **kwargs)
        if isinstance(y, tuple):
            return (torch.zeros_like(y[0]), *y[1:])
        return torch.zeros_like(y)

    return run
