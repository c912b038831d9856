"""Run a decoder layer so that only kept rows have a gradient, while every row is computed.

    first run    all rows, without gradient: the results of the others, and all keys and values; the
                 MLP branch sees the others alone
    second run   kept rows, with gradient: their queries see all keys and values, of which those of
                 the others come from the first run

A layer hands its keys and values to whatever it is given as its cache: so they are taken and joined
there, behind the rotary positions. Nothing of the first run is saved for the backward pass but
these.

Shapes: B rows, T positions, K slots, H hidden, N heads, D size of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.adapters.attachment import Attachment
from regate_ds.adapters.huggingface.layer_inputs import ForwardPass
from regate_ds.adapters.huggingface.mlp import MlpGate, gate_mlps, with_rows
from regate_ds.algorithm.executions.execution import Span
from regate_ds.algorithm.gate import keep, restore
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.families.text_decoders import TEXT_DECODERS

_CACHES = ("cache", "past_key_values", "layer_past")
"""Names under which a layer takes a cache, by version of transformers and class."""

_WITH_CACHE = "_can_checkpoint_with_cache"
"""Attribute of a layer by which transformers 5.24 checkpoints it together with its cache."""


class _Taken:
    """Takes the keys and values of all rows."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.pairs.append((key, value))
        return key, value


class _Joined:
    """Puts the keys and values of kept rows among those of all; a recomputation does so again."""

    def __init__(self, pair: tuple[Tensor, Tensor], plan: ElisionPlan) -> None:
        self._pair, self._plan = pair, plan

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        all_key, all_value = self._pair
        return _among(all_key, key, self._plan), _among(all_value, value, self._plan)


def _among(all_BNTD: Tensor, kept_BNKD: Tensor, plan: ElisionPlan) -> Tensor:
    """Return all rows [B, N, T, D], in which kept slots [B, N, K, D] have replaced theirs."""
    x_BTH, y_BKH = (one.transpose(1, 2).flatten(2) for one in (all_BNTD, kept_BNKD))
    size = (all_BNTD.shape[1], all_BNTD.shape[3])
    return restore(x_BTH, y_BKH, plan).unflatten(2, size).transpose(1, 2)


@dataclass(frozen=True)
class BackwardGate:
    """How one layer is run so."""

    mlp: MlpGate
    cache: str
    """Name of the layer's argument for a cache."""


def gate_inside(
    attachment: Attachment, decoder: Any, span: Span | None, multiple: int
) -> dict[int, MlpGate] | dict[int, BackwardGate]:
    """Return the gates of a span of less than whole layers, by the layers' numbers.

    ValueError as ``gate_mlps``.
    """
    mlps = gate_mlps(attachment, decoder, span, multiple)
    if span is None or span.part != "backward":
        return mlps
    gates: dict[int, BackwardGate] = {}
    for number, mlp in mlps.items():
        layer = decoder.layers[number]
        attachment.put(layer, _WITH_CACHE, True)
        cache = _cache_name(layer)
        assert cache is not None
        gates[number] = BackwardGate(mlp, cache)
    return gates


def require_keys_joined(decoder: Any, span: Span | None) -> None:
    """Refuse, by ValueError, a decoder whose keys and values cannot be taken so."""
    if span is None or span.part != "backward":
        return
    kind = decoder.config.model_type
    names = [_cache_name(layer) for layer in decoder.layers[span.first : span.last]]
    record = TEXT_DECODERS[kind]
    is_sharing = bool(getattr(decoder.config, "num_kv_shared_layers", 0))
    if record.recurrent or is_sharing or not record.joins_keys or None in names:
        raise ValueError(
            f"decoder {kind!r} does not hand its cache the keys and values that each layer attends "
            "to, all of them and nothing else, so that rows cannot be computed without gradient; "
            "use execution=elide"
        )
    if decoder.config._attn_implementation == "flash_attention_2":
        raise ValueError(
            "execution=backward_only needs a mask of kept rows over all, which flash_attention_2 "
            "does not take; load the model with attn_implementation='sdpa' or 'eager'"
        )


def _cache_name(layer: nn.Module) -> str | None:
    names = signature(layer.forward).parameters
    return next((name for name in _CACHES if name in names), None)


def run_backward(
    host_forward: Any,
    gate: BackwardGate,
    within: ForwardPass,
    hidden_BTH: Tensor,
    given: dict[str, Any],
) -> Tensor:
    """Run the host's layer on all rows; only the plan's kept rows have a gradient.

    given: the layer's other arguments, by name.

    ValueError if the layer does not hand one pair of keys and values to its cache.
    """
    layer, plan, taken = host_forward.__self__, within.plan, _Taken()
    with torch.no_grad():
        ungated = {**given, **within.ungated, gate.cache: taken}
        y_BTH = with_rows(host_forward, gate.mlp, within.other_rows, hidden_BTH, **ungated)
    # Autocast remembers weights that it has cast, and those of the first run have no gradient.
    # torch 2.13 forgets them by itself; this may go when no older one is supported.
    torch.clear_autocast_cache()
    if len(taken.pairs) != 1:
        raise ValueError(
            f"{type(layer).__name__} handed {len(taken.pairs)} pairs of keys and values to its "
            "cache, not 1, so that rows cannot be computed without gradient; use execution=elide"
        )
    kept = {**within.kept_queries(layer, given), gate.cache: _Joined(taken.pairs[0], plan)}
    return restore(y_BTH, host_forward(keep(hidden_BTH, plan), **kept), plan)
