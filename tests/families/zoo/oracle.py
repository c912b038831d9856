"""What a plan's loss is, by the host's own forward on all positions.

Of the plan only the kept positions and the targets are used, and nothing of the adapter. Around
each gated layer the elided positions are taken out of the host's mask as keys, and keep their
residual. A recurrent layer runs on the kept tokens of each row alone.

Shapes: B rows, T positions, H hidden, L targets, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.plan import ElisionPlan
from tests.families.zoo.masks import without_elided
from tests.families.zoo.recurrent import is_recurrent, run_rows_alone

MASKS = ("attention_mask", "causal_mask", "mask")
"""Names under which a decoder layer is given its mask."""


def oracle_loss(
    host: nn.Module,
    inputs: dict[str, Any],
    plan: ElisionPlan,
    gated: range,
    *,
    deepstack_on_elided: bool = True,
) -> Tensor:
    """Return the summed loss of the plan's targets.

    deepstack_on_elided: whether the host's image features, which it adds between layers, reach
        elided positions in a range that ends early. In one that does not, nobody reads these again.
    """
    with ExitStack() as stack:
        if plan.moves_rows:
            kept_BT, decoder = kept_positions(plan), decoder_of(host)
            # Each layer may have a kept set of its own.
            for number, own in zip(gated, plan.sets or [plan] * len(gated), strict=True):
                layer = decoder.layers[number]
                run = _gated(layer, kept_positions(own), decoder)
                stack.enter_context(replaced(layer, "forward", run))
            if hasattr(decoder, "_deepstack_process") and not deepstack_on_elided:
                process = _only_kept(decoder, kept_BT, gated)
                stack.enter_context(replaced(decoder, "_deepstack_process", process))
        logits_BTV = logits_of(host, inputs)
    return summed(logits_BTV, plan.label_position_L, plan.targets_L)


def host_loss(host: nn.Module, inputs: dict[str, Any], batch: TokenBatch) -> Tensor:
    """Return the summed loss of all labels by the host's own logits."""
    logits_BTV = logits_of(host, inputs)
    position_L = batch.is_label_BT.reshape(-1).nonzero().squeeze(1)
    return summed(logits_BTV, position_L, batch.labels_BT.reshape(-1)[position_L])


def kept_positions(plan: ElisionPlan) -> Tensor:
    """Return bool [B, T]: the positions that enter gated layers."""
    kept_BT = torch.zeros(len(plan.kept_BK), plan.num_tokens, dtype=torch.bool)
    kept_BT.view(-1)[plan.position_R] = True
    return kept_BT


def decoder_of(host: Any) -> Any:
    """Return the module that has the decoder's layers."""
    decoder = host.get_decoder()
    if not hasattr(decoder, "layers"):  # Llama 4's get_decoder returns a causal language model
        decoder = decoder.model
    return decoder


def logits_of(host: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return host(**inputs, use_cache=False).logits


def summed(logits_BTV: Tensor, position_L: Tensor, targets_L: Tensor) -> Tensor:
    logits_LV = logits_BTV.double().flatten(0, 1)[position_L]
    return nn.functional.cross_entropy(logits_LV, targets_L, reduction="sum")


def _gated(layer: Any, kept_BT: Tensor, decoder: Any) -> Callable[..., Any]:
    """Return the layer's forward on a stream in which only kept positions exist."""
    forward, names = layer.forward, inspect.signature(layer.forward)
    rest = [p.name for p in names.parameters.values() if p.kind is p.VAR_KEYWORD]

    def run(*args: Any, **kwargs: Any) -> Any:
        given = dict(names.bind(*args, **kwargs).arguments)
        for name in rest:
            given.update(given.pop(name, {}))
        x_BTH = next(iter(given.values()))
        if is_recurrent(layer):
            return run_rows_alone(forward, given, kept_BT)
        found = [name for name in MASKS if name in names.parameters or name in given]
        implementation = decoder.config._attn_implementation
        for name in found[:1]:
            given[name] = without_elided(given.get(name), kept_BT, layer, implementation, x_BTH)
        y = forward(**given)
        if isinstance(y, tuple):
            return (_rides(kept_BT, y[0], x_BTH), *y[1:])
        return _rides(kept_BT, y, x_BTH)

    return run


def _rides(kept_BT: Tensor, y_BTH: Tensor, x_BTH: Tensor) -> Tensor:
    """Return the results of kept positions, and the residual of all others."""
    return torch.where(kept_BT.view(*kept_BT.shape, *[1] * (y_BTH.dim() - 2)), y_BTH, x_BTH)


def _only_kept(decoder: Any, kept_BT: Tensor, gated: range) -> Callable[..., Any]:
    """Return the deepstack step, after which elided positions are put back to their residual."""
    process, calls = decoder._deepstack_process, iter(range(len(decoder.layers)))

    def run(hidden_BTH: Tensor, *args: Any, **kwargs: Any) -> Any:
        y_BTH = process(hidden_BTH, *args, **kwargs)
        return _rides(kept_BT, y_BTH, hidden_BTH) if next(calls) in gated else y_BTH

    return run


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    object.__setattr__(module, name, value)
    try:
        yield
    finally:
        object.__delattr__(module, name)
