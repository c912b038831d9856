"""Gate the MLP branch of decoder layers alone: it adds exactly 0 to elided rows.

The host's forward of the layer stays, and its mixer sees every row. Hooks on the branch's modules
take the kept rows before the first of them and put the results back behind the last.

    norm        reads kept rows only, [1, R, H]; a branch without one begins at the MLP
    MLP         the same, so that experts see no other rows
    post-norm   the same; whichever comes last returns [B, T, H], with zeros at elided rows

Shapes: B rows, T positions, R kept rows of the micro-batch, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from regate_ds.adapters.attachment import Attachment
from regate_ds.algorithm.executions.execution import Span
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.families.text_decoders import branch_of

_CHECKPOINT = "_gradient_checkpointing_func"
"""Attribute of a layer with which transformers checkpoints it."""

_OF_AN_MLP = re.compile("mlp|feed_?forward|ffn|moe|expert|router")


@dataclass
class MlpGate:
    """The MLP branch of one layer."""

    multiple: int
    """The number of rows is a multiple of it."""

    plan: ElisionPlan | None = None
    """What the branch follows while its layer runs, as the host hands no plan to the modules inside
    a layer."""


@dataclass(frozen=True)
class _Ends:
    """Where the branch of one layer begins and ends."""

    firsts: tuple[nn.Module, ...]
    """Modules that are to read kept rows."""

    lasts: tuple[nn.Module, ...]
    """Modules whose results the layer adds to its residual."""


def gate_mlps(
    attachment: Attachment, decoder: Any, span: Span | None, multiple: int
) -> dict[int, MlpGate]:
    """Hook the branches of a span of MLPs, and return their gates by the layers' numbers.

    ValueError, naming the decoder, for a layer whose branch is not known; nothing is hooked then.
    """
    if span is None or span.part != "mlp":
        return {}
    numbers = range(span.first, span.last)
    ends = [_ends_of(decoder.layers[number], decoder.config.model_type) for number in numbers]
    gates = {number: MlpGate(multiple) for number in numbers}
    for gate, each in zip(gates.values(), ends, strict=True):
        for module in each.firsts:
            attachment.add_hook(module.register_forward_pre_hook(partial(_take_kept, gate=gate)))
        for module in each.lasts:
            attachment.add_hook(module.register_forward_hook(partial(_put_back, gate=gate)))
    return gates


def run_layer(
    host_forward: Any, gate: MlpGate | None, plan: ElisionPlan, *args: Any, **kwargs: Any
) -> Any:
    """Run the host's layer, in which the MLP branch follows the plan."""
    if gate is None or not plan.moves_rows:
        return host_forward(*args, **kwargs)
    layer = host_forward.__self__
    checkpoint = getattr(layer, _CHECKPOINT, None)
    if checkpoint is not None:
        # transformers 5.24 checkpoints inside the layer's forward, so that a backward pass runs
        # again what is in there, and not this function.
        setattr(layer, _CHECKPOINT, partial(_checkpoint_with_plan, checkpoint, gate, plan))
    try:
        return _with_plan(host_forward, gate, plan, *args, **kwargs)
    finally:
        if checkpoint is not None:
            setattr(layer, _CHECKPOINT, checkpoint)


def _checkpoint_with_plan(
    checkpoint: Callable[..., Any],
    gate: MlpGate,
    plan: ElisionPlan,
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Let the checkpoint remember the plan with the function that it runs again."""
    return checkpoint(partial(_with_plan, function, gate, plan), *args, **kwargs)


def _with_plan(
    function: Callable[..., Any], gate: MlpGate, plan: ElisionPlan, *args: Any, **kwargs: Any
) -> Any:
    """Call the function; meanwhile, and no longer, the branch follows the plan.

    A backward pass that runs it again brings the plan of its first run, whichever micro-batch came
    last. The call may end by an exception, by which torch stops a recomputation early.
    """
    if gate.plan is plan:  # The compiler allows nothing to be set inside a checkpoint.
        return function(*args, **kwargs)
    gate.plan = plan
    try:
        return function(*args, **kwargs)
    finally:
        gate.plan = None


def mlp_share(layer: nn.Module, model_type: str) -> float:
    """Return the share of a layer's linear FLOPs that its MLP has.

    ValueError for experts: a token enters some of them, and their number is no fact of the layer.
    """
    mlps = _mlps_of(layer, model_type)
    if any(weight.dim() > 2 for mlp in mlps for weight in mlp.parameters()):
        raise ValueError(
            f"decoder {model_type!r} has experts, so that the share of the MLP in a layer's work, "
            "and with it tokens_processed, is not known; use execution=elide"
        )
    return sum(_num_products(mlp) for mlp in mlps) / _num_products(layer)


def _num_products(module: nn.Module) -> int:
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return sum(m.in_features * m.out_features for m in linear)


def _ends_of(layer: nn.Module, model_type: str) -> _Ends:
    branch = branch_of(type(layer).__name__, model_type)
    norm, post_norm = (
        None if name is None else _module(layer, name, model_type)
        for name in (branch.norm, branch.post_norm)
    )
    mlps = _mlps_of(layer, model_type)
    known = {id(module) for module in (norm, *mlps, post_norm)}
    for name, child in layer.named_children():
        # A dropout has no weights, and turns 0 into 0.
        if id(child) not in known and _OF_AN_MLP.search(name) and not isinstance(child, nn.Dropout):
            raise ValueError(_unknown(layer, name, model_type, "has", "whose place is not known"))
    return _Ends(
        firsts=mlps if norm is None else (norm,), lasts=mlps if post_norm is None else (post_norm,)
    )


def _mlps_of(layer: nn.Module, model_type: str) -> tuple[nn.Module, ...]:
    names = branch_of(type(layer).__name__, model_type).mlps
    found = [_module(layer, name, model_type) for name in names]
    return tuple(module for module in found if module is not None)


def _module(layer: nn.Module, name: str, model_type: str) -> nn.Module | None:
    """Return the layer's module of that name; None if the layer says that it has none."""
    if not hasattr(layer, name):
        raise ValueError(_unknown(layer, name, model_type, "lacks", "where its branch should be"))
    return getattr(layer, name)


def _unknown(layer: nn.Module, name: str, model_type: str, has: str, place: str) -> str:
    return (
        f"decoder {model_type!r}: a {type(layer).__name__} {has} a module {name!r} {place}, so "
        "that the MLP alone cannot be gated; use execution=elide"
    )


def _take_kept(module: nn.Module, args: tuple[Any, ...], *, gate: MlpGate) -> Any:
    """Give the module the kept rows in place of all rows."""
    if gate.plan is None:
        return None
    x_BTH, *rest = args
    position_R = gate.plan.position_R
    # As in whole layers, padding is a row of a token, whose result is thrown away.
    padded_R = nn.functional.pad(position_R, (0, -len(position_R) % gate.multiple))
    return (x_BTH.reshape(-1, x_BTH.shape[-1]).index_select(0, padded_R)[None], *rest)


def _put_back(module: nn.Module, args: Any, output: Any, *, gate: MlpGate) -> Any:
    """Return the results at kept rows, and zeros at the others."""
    if gate.plan is None:
        return None
    if isinstance(output, tuple):  # of experts: what the router said comes second
        return (_at_kept(output[0], gate.plan), *output[1:])
    return _at_kept(output, gate.plan)


def _at_kept(y_1RH: Tensor, plan: ElisionPlan) -> Tensor:
    num_rows, num_tokens, hidden = len(plan.kept_BK), plan.num_tokens, y_1RH.shape[-1]
    y_RH = y_1RH.reshape(-1, hidden)[: plan.num_kept]
    zeros_PH = y_RH.new_zeros(num_rows * num_tokens, hidden)
    return zeros_PH.index_copy(0, plan.position_R, y_RH).view(num_rows, num_tokens, hidden)
