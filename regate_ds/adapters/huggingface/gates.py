"""Token elision inside a Hugging Face causal or multimodal language model.

The plan is an argument of the model's forward (``regate_plan=plan``) and reaches each decoder layer
as an argument, so that activation checkpointing recomputes a layer with the plan of its first run.

    layers before first_layer    see every position, with the host's own inputs
    first gated layer            takes kept positions out of the stream; later layers see only these
    head and loss                run only at kept targets

If the gated range ends before the last layer, each gated layer puts its results back into the full
stream. Where an execution gates the MLP branch or the backward pass alone, the stream stays full,
and `mlp.py` or `backward.py` does it.

Shapes: B rows, T positions, K slots, H hidden, L targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import Tensor, nn
from transformers.utils import ModelOutput

from regate_ds.adapters.attachment import Attachment
from regate_ds.adapters.huggingface.backward import (
    gate_inside,
    require_keys_joined,
)
from regate_ds.adapters.huggingface.calls import (
    require_marks,
    require_passed_through,
    require_plain_call,
    require_samples_apart,
)
from regate_ds.adapters.huggingface.deepstack import METHOD, CurrentPass, add_at_kept
from regate_ds.adapters.huggingface.empty_image import forward_with_tower, has_tower
from regate_ds.adapters.huggingface.head import HeadGate, head_forward
from regate_ds.adapters.huggingface.layer_inputs import ForwardPass
from regate_ds.adapters.huggingface.layers import LayerGate, layer_forward
from regate_ds.adapters.huggingface.prompt import behind_virtual_tokens, num_virtual_tokens
from regate_ds.adapters.huggingface.support import (
    require_host,
    require_keys_within,
    require_span,
)
from regate_ds.adapters.huggingface.tower_calls import Calls
from regate_ds.adapters.huggingface.wishes import NO_WISHES, Wishes
from regate_ds.algorithm.executions.after_forward import narrowed
from regate_ds.algorithm.executions.execution import joined_span
from regate_ds.algorithm.executions.table import require_execution
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.config import RegateConfig, require_config
from regate_ds.families.hosts import Supported


@dataclass
class ElidedOutput(ModelOutput):
    """Output of a forward pass with a plan; it has losses in place of logits."""

    loss_sum: Tensor | None = None
    """Sum of the kept targets' losses, in nats; it is differentiable."""

    losses: Tensor | None = None
    """Loss of each kept target [L], in reading order; differentiable only with ``own_loss``."""

    aux_loss: Tensor | None = None
    """The base model's auxiliary loss, where it returns one."""

    plan: ElisionPlan | None = None
    """The plan that the pass followed."""

    entropy: Tensor | None = None
    """Entropy of the student's distribution at each kept target [L], without gradient; None where
    neither the score nor the host asks for it."""

    is_top1: Tensor | None = None
    """Whether no token is likelier than the kept target, bool [L]; None where the host does not ask
    for it."""

    def __getattr__(self, name: str) -> Any:
        """Say, by AttributeError, where to find what the host's own output has."""
        way = {
            "loss": "take regate.loss(output)",
            "logits": "they are computed at kept targets alone; for all call the model without a "
            "plan, on a batch of your own collate function",
        }.get(name, "it has losses in place of the host's output")
        raise AttributeError(f"a step with a plan has no output.{name}: {way}")


@dataclass(frozen=True)
class _ModelGate:
    """Facts about the model that its replaced forward needs; they are fixed at attach."""

    host: nn.Module
    support: Supported
    current: CurrentPass
    num_layers: int
    gathers: bool
    """Whether gated layers see kept rows only, in a step that elides."""

    num_virtual: int
    """Number of tokens that peft's prompt learning puts before each row."""

    packed_at_end: bool
    """Whether the decoder's output holds kept slots only, in a step that elides."""


def attach_model(
    model: nn.Module,
    config: RegateConfig | None = None,
    *,
    own_loss: bool = False,
    run_tower_without_image: bool = False,
    wishes: Wishes = NO_WISHES,
) -> Attachment:
    """Make ``model(..., regate_plan=plan)`` follow plans of the configuration's execution.

    Without a plan the model runs as the host wrote it.

    config: which layers are gated, and what is done there; None is ``RegateConfig()``.
    own_loss: makes ``ElidedOutput.losses`` differentiable, for users who weigh them themselves.
    run_tower_without_image: makes a micro-batch without an image run an empty one through the
        vision tower, times zero, because ranks of one ZeRO group must all reduce the same
        parameters.
    wishes: what the host asks for beyond that.

    ValueError names what is not supported; RuntimeError if the model is already attached.
    """
    host: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = RegateConfig() if config is None else config
    require_config("config", config)
    support, num_virtual = require_host(model, host), num_virtual_tokens(model, host)
    decoder = host.get_decoder()
    depth = len(decoder.layers)
    last_layer = depth if config.last_layer is None else config.last_layer
    require_span(config.first_layer, last_layer, depth)
    require_execution(config.execution, "huggingface")
    merging = _merging(config, host, support, num_virtual)
    spans = config.execution.spans(config.first_layer, last_layer)
    span, is_apart = joined_span(spans, ("layer", "mlp", "backward")), len(spans) > 1
    require_keys_within(decoder.config, span, is_apart=is_apart)
    require_keys_joined(decoder, span)
    attachment, current = Attachment(wishes.may_displace), CurrentPass()
    inner = gate_inside(attachment, decoder, span, config.token_multiple)
    gathers = span is not None and span.part == "layer"
    packed_at_end = gathers and last_layer == depth and not is_apart
    gate = _ModelGate(host, support, current, depth, gathers, num_virtual, packed_at_end)
    attachment.rebind_forward(host, _model_forward, gate=gate)
    if run_tower_without_image and has_tower(host):
        attachment.rebind_forward(host.base_model, forward_with_tower, host=host)
    with_entropy = wishes.observes or config.records("entropy")
    head_gate = HeadGate(support.change, own_loss, with_entropy, wishes.observes, config.score)
    (merging.attach_merging if merging else _attach_head)(attachment, host, head_gate)
    if support.deepstack:
        attachment.rebind(decoder, METHOD, add_at_kept, current=current)
    types = getattr(decoder.config, "layer_types", None) or [""] * depth
    for number, layer in enumerate(decoder.layers):
        gated = gathers and config.first_layer <= number < last_layer
        restores = gated and not packed_at_end
        packs = restores or (gathers and number == config.first_layer)
        names, within = tuple(signature(layer.forward).parameters)[1:], inner.get(number)
        kept_set = number - config.first_layer if is_apart and gated else None
        layer_gate = LayerGate(
            number, types[number], names, gated, packs, restores, kept_set, within
        )
        attachment.rebind_forward(layer, layer_forward, gate=layer_gate)
    return attachment


def _attach_head(attachment: Attachment, host: Any, gate: HeadGate) -> None:
    attachment.rebind_forward(host.get_output_embeddings(), head_forward, gate=gate)


def _merging(config: RegateConfig, host: Any, support: Supported, num_virtual: int) -> Any:
    """Return the file that merges, once it has judged the model; None where no step is merged."""
    if not config.merge.steps:
        return None
    # Here, so that a run without merged steps does not load it.
    from regate_ds.adapters.merging import huggingface

    huggingface.require_mergeable(host, support, num_virtual)
    return huggingface


def _model_forward(
    host_forward: Any,
    *args: Any,
    gate: _ModelGate,
    regate_plan: ElisionPlan | None = None,
    regate_tower: Calls | None = None,
    **kwargs: Any,
) -> Any:
    if regate_plan is None:
        return host_forward(*args, **kwargs)
    require_plain_call(args, kwargs)
    host, plan = gate.host, regate_plan
    require_marks(host, kwargs, gate.support.marks)
    require_samples_apart(host, plan, kwargs, gate.support)
    asked = plan
    if gate.num_virtual:
        plan = behind_virtual_tokens(plan, gate.num_virtual)
    within = ForwardPass(plan, host, gate.support, gathers=gate.gathers, tower=regate_tower)
    gate.current.value = within
    try:
        outputs = host.base_model(**{**kwargs, "use_cache": False, "regate_plan": within})
    finally:
        gate.current.value = None
    hidden = outputs.last_hidden_state
    is_packed = gate.packed_at_end and plan.moves_rows
    num_rows = plan.num_slots if is_packed else plan.num_tokens
    require_passed_through(host, hidden, num_rows, within.num_seen, gate.num_layers)
    rows_L = plan.head_rows(packed=is_packed)
    hidden_LH = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows_L)
    found = host.get_output_embeddings()(hidden_LH, regate_plan=asked)
    loss_sum, losses_L, entropy_L, top1_L, chosen_C = found
    plan = asked if chosen_C is None else narrowed(asked, chosen_C)
    aux_loss = getattr(outputs, "aux_loss", None)
    return ElidedOutput(
        loss_sum=loss_sum,
        losses=losses_L,
        aux_loss=aux_loss,
        plan=plan,
        entropy=entropy_L,
        is_top1=top1_L,
    )
