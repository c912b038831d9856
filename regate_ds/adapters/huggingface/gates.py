"""Token elision inside a Hugging Face causal or multimodal language model.

The plan is an argument of the model's forward (``regate_plan=plan``) and travels as one to each
decoder layer, so that activation checkpointing recomputes with the plan it was computed with.

    layers before first_layer    every position, the host's own inputs
    first gated layer            takes the kept positions out of the stream: all after it is packed
    head and loss                only at kept targets

If the gated range ends before the last layer, each gated layer puts its results back at once.

Shapes: B rows, T positions, K slots, H hidden, L targets, D size of a rotary embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.utils import ModelOutput

from regate_ds.adapters.attachment import Attachment
from regate_ds.adapters.huggingface.attention import (
    BOUNDARIES,
    attention_inputs,
    ungated_attention_inputs,
)
from regate_ds.adapters.huggingface.empty_image import PIXELS, with_empty_image
from regate_ds.adapters.huggingface.support import (
    require_language_model,
    require_plain_call,
    require_rows,
    require_supported_decoder,
    require_window,
)
from regate_ds.algorithm.gate import keep, restore
from regate_ds.algorithm.loss import summed_loss, token_losses
from regate_ds.algorithm.plan import ElisionPlan


@dataclass
class ElidedOutput(ModelOutput):
    """What a forward pass with a plan returns in place of logits."""

    loss_sum: Tensor | None = None
    """Sum of the kept targets' losses, in nats; differentiable."""

    losses: Tensor | None = None
    """Loss of each kept target [L], in reading order; differentiable with ``own_loss`` only."""

    aux_loss: Tensor | None = None
    """The base model's auxiliary loss, where it returns one."""


@dataclass(frozen=True)
class _Gated:
    """What travels to the layers with a micro-batch."""

    plan: ElisionPlan
    attention: dict[str, Any]
    ungated_attention: dict[str, Any]


@dataclass(frozen=True)
class _ModelGate:
    """What the model's forward knows from attach time."""

    host: nn.Module
    packed_at_end: bool


@dataclass(frozen=True)
class _LayerGate:
    """A decoder layer's part in the gated range."""

    number: int
    gated: bool
    packs: bool
    restores: bool


def attach_model(
    model: nn.Module,
    *,
    first_layer: int = 1,
    last_layer: int | None = None,
    own_loss: bool = False,
    run_tower_without_image: bool = False,
) -> Attachment:
    """Let ``model(..., regate_plan=plan)`` process kept tokens only; without a plan it is the host.

    own_loss: ``ElidedOutput.losses`` are differentiable, for users who weigh them themselves.
    run_tower_without_image: a micro-batch without an image runs an empty one through the vision
        tower, times zero, as ranks of one ZeRO group must all reduce the same parameters.

    ValueError names what is not supported; RuntimeError if the model is attached already.
    """
    host = model.get_base_model() if hasattr(model, "get_base_model") else model
    require_language_model(model, host)
    decoder = host.get_decoder()
    depth = len(decoder.layers)
    last_layer = depth if last_layer is None else last_layer
    require_supported_decoder(host, decoder, first_layer, last_layer)
    attachment = Attachment()
    ends_early = last_layer < depth
    gate = _ModelGate(host, packed_at_end=not ends_early)
    attachment.rebind_forward(host, _model_forward, gate=gate)
    if run_tower_without_image and has_tower(host):
        attachment.rebind_forward(host.base_model, _base_forward, host=host)
    attachment.rebind_forward(host.get_output_embeddings(), _head_forward, own_loss=own_loss)
    for number, layer in enumerate(decoder.layers):
        gated = first_layer <= number < last_layer
        restores = gated and ends_early
        packs = restores or number == first_layer
        layer_gate = _LayerGate(number, gated, packs, restores)
        attachment.rebind_forward(layer, _layer_forward, gate=layer_gate)
    return attachment


def has_tower(model: nn.Module) -> bool:
    """Whether the model has a vision side."""
    return getattr(getattr(model, "config", None), "vision_config", None) is not None


def _model_forward(
    host_forward: Any,
    *args: Any,
    gate: _ModelGate,
    regate_plan: ElisionPlan | None = None,
    **kwargs: Any,
) -> Any:
    if regate_plan is None:
        return host_forward(*args, **kwargs)
    require_plain_call(args, kwargs)
    host, plan = gate.host, regate_plan
    require_window(host, plan)
    inputs = {} if plan.is_dense else attention_inputs(plan, host)
    gated = _Gated(plan, inputs, ungated_attention_inputs(plan, host))
    outputs = host.base_model(**{**kwargs, "use_cache": False, "regate_plan": gated})
    hidden = outputs.last_hidden_state
    is_packed = gate.packed_at_end and not plan.is_dense
    rows_L = plan.label_slot_L if is_packed else plan.label_position_L
    hidden_LH = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows_L)
    loss_sum, losses_L = host.get_output_embeddings()(hidden_LH, regate_targets=plan.targets_L)
    aux_loss = getattr(outputs, "aux_loss", None)
    return ElidedOutput(loss_sum=loss_sum, losses=losses_L, aux_loss=aux_loss)


def _base_forward(
    host_forward: Any,
    *args: Any,
    host: nn.Module,
    regate_plan: _Gated | None = None,
    **kwargs: Any,
) -> Any:
    """Inside the base model's own call: under ZeRO-3 all ranks must enter modules in one order."""
    if regate_plan is None:
        return host_forward(*args, **kwargs)
    if all(kwargs.get(name) is None for name in PIXELS):
        kwargs = with_empty_image(host, kwargs)
    return host_forward(*args, **kwargs, regate_plan=regate_plan)


def _layer_forward(
    host_forward: Any,
    hidden_states: Tensor,
    *args: Any,
    gate: _LayerGate,
    regate_plan: _Gated | None = None,
    **kwargs: Any,
) -> Any:
    if regate_plan is None:
        return host_forward(hidden_states, *args, **kwargs)
    plan = regate_plan.plan
    if gate.number == 0:
        require_rows(hidden_states, plan)
    if plan.is_dense or not gate.gated:
        return host_forward(hidden_states, *args, **{**kwargs, **regate_plan.ungated_attention})
    x = keep(hidden_states, plan) if gate.packs else hidden_states
    y = host_forward(x, *args, **_at_kept(kwargs, plan), **regate_plan.attention)
    return restore(hidden_states, y, plan) if gate.restores else y


def _at_kept(kwargs: dict[str, Any], plan: ElisionPlan) -> dict[str, Any]:
    """The layer's inputs at kept positions; the mask is left out, as attention_inputs has ours."""
    own = {"attention_mask", "position_ids", "position_embeddings", *BOUNDARIES}
    rotary = tuple(_rotary_at_kept(x, plan) for x in kwargs["position_embeddings"])
    return {
        **{k: v for k, v in kwargs.items() if k not in own},
        "position_ids": None,
        "position_embeddings": rotary,
    }


def _rotary_at_kept(x: Tensor, plan: ElisionPlan) -> Tensor:
    """[..., B or 1, T, D] -> [..., B, K, D]: kept tokens keep their original positions."""
    *lead, _, num_tokens, size = x.shape
    num_rows, num_slots = plan.kept_BK.shape
    x_BTD = x.expand(*lead, num_rows, num_tokens, size)
    index = plan.kept_BK.unsqueeze(-1).expand(*lead, num_rows, num_slots, size)
    return x_BTD.gather(-2, index)


def _head_forward(
    host_forward: Any,
    hidden: Tensor,
    *,
    own_loss: bool,
    regate_targets: Tensor | None = None,
) -> Any:
    if regate_targets is None:
        return host_forward(hidden)
    # Inside the head's own call, because ZeRO-3 has its weight here and nowhere else.
    head = host_forward.__self__
    if own_loss:
        losses_L = token_losses(hidden, head.weight, head.bias, regate_targets)
        return losses_L.sum(), losses_L
    return summed_loss(hidden, head.weight, head.bias, regate_targets)
