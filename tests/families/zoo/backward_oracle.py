"""What the loss is where only kept positions have a gradient, by autograd on the dense model.

Every position runs through the host's own layers. In gated ones the results of the other positions
are detached, and so are their keys and values, where the host hands them to attention.

Shapes: B rows, T positions, N heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from regate_ds.algorithm.plan import ElisionPlan
from tests.families.zoo.oracle import (
    decoder_of,
    kept_positions,
    logits_of,
    replaced,
    summed,
)


def backward_oracle_loss(
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
    """Return the layer's forward, through which only kept positions have a gradient."""
    forward = layer.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        calls: list[int] = []
        with replaced(ALL_ATTENTION_FUNCTIONS, "get_interface", _detaching(kept_BT, calls)):
            y = forward(*args, **kwargs)
        assert len(calls) == 1, f"{type(layer).__name__} attended {len(calls)} times"
        if isinstance(y, tuple):
            return (_only_kept(y[0], kept_BT[..., None]), *y[1:])
        return _only_kept(y, kept_BT[..., None])

    return run


def _detaching(kept_BT: Tensor, calls: list[int]) -> Callable[..., Any]:
    """Return what hosts ask for an attention function: theirs, on keys of others as constants."""
    get_interface, is_kept = ALL_ATTENTION_FUNCTIONS.get_interface, kept_BT[:, None, :, None]

    def asked(*asked_for: Any, **how: Any) -> Callable[..., Any]:
        attend = get_interface(*asked_for, **how)

        def run(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any):
            calls.append(1)
            key, value = _only_kept(key, is_kept), _only_kept(value, is_kept)
            return attend(module, query, key, value, *args, **kw)

        return run

    return asked


def _only_kept(x: Tensor, is_kept: Tensor) -> Tensor:
    """Return the same values; those of the other positions are detached."""
    return torch.where(is_kept, x, x.detach())
