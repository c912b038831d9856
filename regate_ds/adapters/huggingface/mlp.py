"""Gate the MLP branch of decoder layers alone: it adds exactly 0 to elided rows.

The host's forward of the layer stays, and its mixer sees every row. Hooks on the branch's modules
take the kept rows before the first of them and put the results back behind the last.

    norm        reads kept rows only, [1, R, H]; a branch without one begins at the MLP
    MLP         the same, so that experts see no other rows
    post-norm   the same; whichever comes last returns [B, T, H], with zeros at elided rows

Where the backward pass alone is gated, the rows in question are the others (`backward.py`).

Shapes: B rows, T positions, R kept rows of the micro-batch, P positions of it, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class BranchRows:
    """The rows of a micro-batch that a branch reads."""

    position_R: Tensor
    """int64: flat indices into [B * T]."""

    num_rows: int
    """B."""

    num_tokens: int
    """T."""


def kept_rows(plan: ElisionPlan) -> BranchRows:
    return BranchRows(plan.position_R, len(plan.kept_BK), plan.num_tokens)


def other_rows(plan: ElisionPlan) -> BranchRows:
    """Return all rows but the kept ones, padding included."""
    kept = kept_rows(plan)
    is_kept_P = kept.position_R.new_zeros(kept.num_rows * kept.num_tokens)
    is_kept_P = is_kept_P.index_fill(0, kept.position_R, 1)
    # Sorted, as their number is known: nothing waits for the device.
    position_R = is_kept_P.argsort(stable=True)[: len(is_kept_P) - plan.num_kept]
    return replace(kept, position_R=position_R)


@dataclass
class MlpGate:
    """The MLP branch of one layer."""

    multiple: int
    """The number of rows is a multiple of it."""

    rows: BranchRows | None = None
    """What the branch reads while its layer runs, as the host hands no plan to the modules inside a
    layer."""


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
    """Hook the branches of a span of less than whole layers; return the gates by layers' numbers.

    ValueError, naming the decoder, for a layer whose branch is not known; nothing is hooked then.
    """
    if span is None or span.part not in ("mlp", "backward"):
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
    host_forward: Any, gate: MlpGate, plan: ElisionPlan, *args: Any, **kwargs: Any
) -> Any:
    """Run the host's layer, in which the MLP branch follows the plan."""
    rows = kept_rows(plan)
    layer = host_forward.__self__
    checkpoint = getattr(layer, _CHECKPOINT, None)
    if checkpoint is not None:
        # transformers 5.24 checkpoints inside the layer's forward, so that a backward pass runs
        # again what is in there, and not this function.
        setattr(layer, _CHECKPOINT, partial(_checkpoint_with_rows, checkpoint, gate, rows))
    try:
        return with_rows(host_forward, gate, rows, *args, **kwargs)
    finally:
        if checkpoint is not None:
            setattr(layer, _CHECKPOINT, checkpoint)


def _checkpoint_with_rows(
    checkpoint: Callable[..., Any],
    gate: MlpGate,
    rows: BranchRows,
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Let the checkpoint remember the rows with the function that it runs again."""
    return checkpoint(partial(with_rows, function, gate, rows), *args, **kwargs)


def with_rows(
    function: Callable[..., Any], gate: MlpGate, rows: BranchRows, *args: Any, **kwargs: Any
) -> Any:
    """Call the function; meanwhile, and no longer, the branch reads these rows alone.

    A backward pass that runs it again brings the rows of its first run, whichever micro-batch came
    last. The call may end by an exception, by which torch stops a recomputation early.
    """
    if gate.rows is rows:  # The compiler allows nothing to be set inside a checkpoint.
        return function(*args, **kwargs)
    gate.rows = rows
    try:
        return function(*args, **kwargs)
    finally:
        gate.rows = None


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
    """Give the module the gate's rows in place of all rows."""
    if gate.rows is None:
        return None
    x_BTH, *rest = args
    position_R = gate.rows.position_R
    # As in whole layers, padding is a row of a token, whose result is thrown away. Without a row
    # there is some all the same: ranks under ZeRO-3 run the same modules.
    missing = -len(position_R) % gate.multiple if len(position_R) else gate.multiple
    padded_R = nn.functional.pad(position_R, (0, missing))
    return (x_BTH.reshape(-1, x_BTH.shape[-1]).index_select(0, padded_R)[None], *rest)


def _put_back(module: nn.Module, args: Any, output: Any, *, gate: MlpGate) -> Any:
    """Return the results at the gate's rows, and zeros at the others."""
    if gate.rows is None:
        return None
    if isinstance(output, tuple):  # of experts: what the router said comes second
        return (_among_zeros(output[0], gate.rows), *output[1:])
    return _among_zeros(output, gate.rows)


def _among_zeros(y_1RH: Tensor, rows: BranchRows) -> Tensor:
    hidden = y_1RH.shape[-1]
    y_RH = y_1RH.reshape(-1, hidden)[: len(rows.position_R)]
    zeros_PH = y_RH.new_zeros(rows.num_rows * rows.num_tokens, hidden)
    y_PH = zeros_PH.index_copy(0, rows.position_R, y_RH)
    return y_PH.view(rows.num_rows, rows.num_tokens, hidden)
