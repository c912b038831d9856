"""What the layers of one forward pass are given in place of the host's own arguments.

Every argument with a row for each token is either known here, and taken at kept positions, or
refused by name: a shape cannot tell, because it may fit by chance or where a row keeps everything.

Shapes: B rows, T positions, K slots, D values of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.adapters.huggingface.attention import (
    attention_inputs,
    attention_of,
    mask_at_kept_queries,
    own_mask_at_kept,
    ungated_attention_inputs,
)
from regate_ds.adapters.huggingface.calls import require_window, window_of
from regate_ds.adapters.huggingface.mlp import BranchRows, other_rows
from regate_ds.adapters.huggingface.tower_calls import Calls
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.data.joined import BOUNDARIES
from regate_ds.families.hosts import Supported

_UNUSED = ("position_ids", "cache_position", "mm_token_type_ids")
"""What layers are given and no layer needs: rotary positions are computed already, a plan has no
cache, and images have their places. transformers 5.24 gives the first alone."""

_KNOWN = ("attention_mask", "position_embeddings", *_UNUSED, *BOUNDARIES)


class ForwardPass:
    """One forward pass with a plan. It travels as an argument of every layer."""

    def __init__(
        self,
        plan: ElisionPlan,
        host: Any,
        support: Supported,
        *,
        gathers: bool,
        tower: Calls | None = None,
    ) -> None:
        """Prepare what layers are given.

        gathers: whether gated layers see kept rows only, where the plan moves rows.
        tower: the calls of the vision tower that every data rank makes; None if not agreed on.
        """
        self.plan, self.tower, self._support, self._host = plan, tower, support, host
        gathers = gathers and plan.moves_rows
        self.num_seen = 0
        """Number of the layers that have been given the plan."""
        self._rotary_of: dict[int, tuple[Tensor, Tensor]] = {}
        """What the host gave, by its id, and the same at kept positions: all layers share it, so
        that the backward pass holds it once."""
        self.holds_kept_rows = False
        """Whether the decoder's stream holds kept rows only, at this moment of the pass."""
        self.ungated = ungated_attention_inputs(plan, host)
        self._implementation = attention_of(host)
        window = window_of(host)
        reaches_window = window is not None and plan.num_tokens >= window
        self._own_mask = support.own_mask or reaches_window
        if gathers and reaches_window:
            require_window(self._implementation, plan.num_tokens, window)
        from_plan = gathers and not (self._own_mask and self._implementation == "eager")
        self._attention = attention_inputs(plan, host) if from_plan else {}

    @cached_property
    def sets(self) -> tuple[ForwardPass, ...]:
        """The pass with each kept set of the plan, where spans have their own."""
        host, support = self._host, self._support
        return tuple(ForwardPass(one, host, support, gathers=True) for one in self.plan.sets)

    def gated(self, layer: nn.Module, layer_type: str, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a gated layer at kept positions.

        ValueError for a tensor whose meaning is not known.
        """
        inputs = self._at_kept(layer, given)
        return {**inputs, **self._mask(layer, layer_type, given.get("attention_mask"))}

    def kept_queries(self, layer: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a layer in which kept rows attend to the keys of all.

        ValueError as ``gated``.
        """
        inputs, mask = self._at_kept(layer, given), given.get("attention_mask")
        may_be_none = self._implementation != "eager" and _is_causal(layer)
        if not (mask is None and may_be_none and not self.plan.is_packed):
            _require_axes(layer, mask)
        return {**inputs, "attention_mask": mask_at_kept_queries(mask, self.plan)}

    @cached_property
    def other_rows(self) -> BranchRows:
        """The rows that are not kept, padding included."""
        return other_rows(self.plan)

    def _at_kept(self, layer: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        """Return a layer's arguments at kept positions; its mask is as the host gave it."""
        self._require_known(layer, given)
        inputs = {name: value for name, value in given.items() if name not in BOUNDARIES}
        if "position_embeddings" in given:
            inputs["position_embeddings"] = self._rotary(given["position_embeddings"])
        for name in _UNUSED:
            if given.get(name) is not None:
                inputs[name] = None
        for name in self._support.token_inputs:
            if given.get(name) is not None:
                inputs[name] = _tokens_at_kept(given[name], self.plan)
        return inputs

    def _mask(self, layer: nn.Module, layer_type: str, mask: Any) -> dict[str, Any]:
        if layer_type in self._support.recurrent:
            # A state reaches a token from earlier ones alone, so padding at the end is harmless.
            return {"attention_mask": None}
        if not self._own_mask:
            return self._attention
        if mask is None and self._implementation != "eager" and _is_causal(layer):
            return self._attention
        _require_axes(layer, mask)
        return {"attention_mask": own_mask_at_kept(mask, self.plan)}

    def _rotary(self, given: Any) -> Any:
        if given is None:
            return None
        if isinstance(given, Tensor):
            # A compiled layer would be compiled again for each change of the cache.
            if torch.compiler.is_compiling():
                return _rotary_at_kept(given, self.plan)
            if id(given) not in self._rotary_of:
                self._rotary_of[id(given)] = given, _rotary_at_kept(given, self.plan)
            return self._rotary_of[id(given)][1]
        return tuple(self._rotary(one) for one in given)

    def _require_known(self, layer: nn.Module, given: dict[str, Any]) -> None:
        known = {*_KNOWN, *self._support.token_inputs}
        for name, value in given.items():
            if name not in known and any(True for _ in _tensors(value)):
                raise ValueError(
                    f"{type(layer).__name__} is given {name!r}, of which elision does not know "
                    "whether it has a row for each token; leave that input out, or turn elision "
                    "off"
                )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _require_axes(layer: nn.Module, mask: Any) -> None:
    """Refuse, by ValueError, a mask that cannot be taken at kept positions."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"{type(layer).__name__} is given an attention_mask that is no tensor of four axes "
            f"({found}), which cannot be taken at kept positions; load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )


def _is_causal(layer: nn.Module) -> bool:
    """Return whether every attention module of a layer is causal where it is given no mask."""
    return all(getattr(module, "is_causal", True) for module in layer.modules())


def _rotary_at_kept(x: Tensor, plan: ElisionPlan) -> Tensor:
    """Select the rotary embedding of kept positions: [..., B or 1, T, D] -> [..., B, K, D].

    Kept tokens thus have their original positions.
    """
    *lead, _, num_tokens, size = x.shape
    num_rows, num_slots = plan.kept_BK.shape
    x_BTD = x.expand(*lead, num_rows, num_tokens, size)
    index = plan.kept_BK.unsqueeze(-1).expand(*lead, num_rows, num_slots, size)
    return x_BTD.gather(-2, index)


def _tokens_at_kept(x: Tensor, plan: ElisionPlan) -> Tensor:
    """Select the rows of kept tokens: [B or 1, T, ...] -> [B, K, ...]."""
    num_rows, num_slots = plan.kept_BK.shape
    x_BT = x.expand(num_rows, *x.shape[1:])
    index = plan.kept_BK.view(num_rows, num_slots, *[1] * (x.dim() - 2))
    return x_BT.gather(1, index.expand(num_rows, num_slots, *x.shape[2:]))


def arguments_by_name(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return all arguments of a layer behind its hidden states by name.

    names: the layer's own, in order, from the second on.
    """
    return {**dict(zip(names, args, strict=False)), **kwargs}


def by_position(names: tuple[str, ...], given: dict[str, Any]) -> list[Any]:
    """Take out of ``given`` the arguments of these names, which the host gives by position.

    Reentrant checkpointing has no gradients for what a layer is given by name.
    """
    return [given.pop(name) for name in names]
