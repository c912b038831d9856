"""What one decoder layer does with a plan: take rows out of the stream, run, put them back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from regate_ds.adapters.huggingface.backward import BackwardGate, run_backward
from regate_ds.adapters.huggingface.calls import require_rows
from regate_ds.adapters.huggingface.layer_inputs import ForwardPass, arguments_by_name, by_position
from regate_ds.adapters.huggingface.mlp import MlpGate, run_layer
from regate_ds.algorithm.gate import keep, restore


@dataclass(frozen=True)
class LayerGate:
    """What one decoder layer does in a step that elides."""

    number: int
    layer_type: str
    names: tuple[str, ...]
    """Names of the layer's arguments behind its hidden states."""

    gated: bool
    """Whether the layer runs on kept slots."""

    packs: bool
    """Whether the layer takes the kept positions out of its input."""

    restores: bool
    """Whether the layer puts its results back into the full stream."""

    kept_set: int | None
    """Which of the plan's kept sets the layer runs on; None if the plan has one for all layers."""

    inner: MlpGate | BackwardGate | None
    """What is gated where that is less than the whole layer."""


def layer_forward(
    host_forward: Any,
    hidden_states: Tensor,
    *args: Any,
    gate: LayerGate,
    regate_plan: ForwardPass | None = None,
    **kwargs: Any,
) -> Any:
    """Run the host's layer as plan and gate say; without a plan, as the host does."""
    if regate_plan is None:
        return host_forward(hidden_states, *args, **kwargs)
    within, plan = regate_plan, regate_plan.plan
    within.num_seen += 1
    if gate.number == 0:
        require_rows(hidden_states, plan)
    inner = gate.inner if plan.moves_rows else None
    if isinstance(inner, MlpGate):
        given = {**kwargs, **within.ungated}
        return run_layer(host_forward, inner, plan, hidden_states, *args, **given)
    given = arguments_by_name(gate.names, args, kwargs)
    if isinstance(inner, BackwardGate):
        return run_backward(host_forward, inner, within, hidden_states, given)
    if not plan.moves_rows or not gate.gated:
        return host_forward(hidden_states, *args, **{**kwargs, **within.ungated})
    own = within if gate.kept_set is None else within.sets[gate.kept_set]
    x = keep(hidden_states, own.plan) if gate.packs else hidden_states
    given = own.gated(host_forward.__self__, gate.layer_type, given)
    positional = by_position(gate.names[: len(args)], given)
    y = host_forward(x, *positional, **given)
    within.holds_kept_rows = not gate.restores
    return restore(hidden_states, y, own.plan) if gate.restores else y
