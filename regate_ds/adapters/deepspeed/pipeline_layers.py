"""A Hugging Face language model as the flat list of layers that a DeepSpeed pipeline wants.

Between layers goes a tuple of tensors: the stream, its positions, and the number of the
micro-batch. Each stage looks the plan of that number up, so that 1F1B and activation recomputation
find the right one.

    embed        embeds the text, and the images if there are any
    decoder i    one decoder layer; the one before the gated range ends with the gather
    head         final norm, output layer and loss, at kept targets only

The number is the length of a tensor: the host knows it without waiting for the device.

Shapes: B rows, T positions, S = T or, behind the gather, K slots, H hidden, L targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.adapters.huggingface.empty_image import PIXELS, with_empty_image
from regate_ds.algorithm.gate import keep
from regate_ds.algorithm.loss import summed_loss
from regate_ds.algorithm.plan import ElisionPlan

Flow = tuple[Tensor, Tensor, Tensor]
"""Stream [B, S, H], its positions [B, S], and the micro-batch's number as a length."""


@dataclass
class Micro:
    """What a stage knows of a micro-batch besides its tensors."""

    plan: ElisionPlan | None
    """None is the host's own run."""

    names: tuple[str, ...] = ()
    """Names of the model inputs, in the order of the tensors that the first stage is given."""


@dataclass
class Desk:
    """The micro-batches of the step that runs, by number; all layers of a stage share one."""

    micro: Sequence[Micro] = field(default_factory=tuple)

    def of(self, number: Tensor) -> Micro:
        return self.micro[len(number) - 1]


def numbered(number: int, device: torch.device) -> Tensor:
    return torch.zeros(number + 1, dtype=torch.uint8, device=device)


class Embed(nn.Module):
    """Model inputs to the embedded sequence: the host's base model without its decoder layers."""

    def __init__(self, host: nn.Module, desk: Desk, *, gathers: bool, needs_tower: bool) -> None:
        super().__init__()
        self.base_model: Any = host.base_model
        self._host = (host,)  # in a tuple: not a submodule, which would own all layers
        self._desk, self._gathers, self._needs_tower = desk, gathers, needs_tower

    def forward(self, inputs: tuple[Tensor, ...]) -> Flow:
        *tensors, number = inputs
        micro = self._desk.of(number)
        named = dict(zip(micro.names, tensors, strict=True))
        positions = named.pop("position_ids", None)
        named.pop("attention_mask", None)  # padding is on the right: causal order hides it
        if self._needs_tower and all(named.get(name) is None for name in PIXELS):
            named = with_empty_image(self._host[0], named)
        hidden = self.base_model(**named, use_cache=False).last_hidden_state
        if positions is None:
            positions = torch.arange(hidden.shape[1], device=hidden.device)
            positions = positions.expand(hidden.shape[:2])
        # What is sent must lie in one piece.
        flow = (hidden, positions.contiguous(), number)
        return gathered(flow, micro.plan) if self._gathers else flow


class Decoder(nn.Module):
    """One decoder layer of the host."""

    def __init__(self, layer: nn.Module, rotary: nn.Module, desk: Desk, *, gathers: bool) -> None:
        super().__init__()
        self.layer, self.rotary = layer, rotary
        self._desk, self._gathers = desk, gathers

    def forward(self, flow: Flow) -> Flow:
        hidden, positions, number = flow
        hidden = self.layer(
            hidden,
            # One sample a row with its padding at the end: causal order is the whole mask.
            attention_mask=self._mask(hidden),
            position_embeddings=self.rotary(hidden, positions),
        )
        flow = (hidden, positions, number)
        return gathered(flow, self._desk.of(number).plan) if self._gathers else flow

    def _mask(self, hidden: Tensor) -> Tensor | None:
        if self.layer.self_attn.config._attn_implementation != "eager":
            return None
        lowest, size = torch.finfo(hidden.dtype).min, hidden.shape[1]
        return hidden.new_full((1, 1, size, size), lowest).triu(1)


def gathered(flow: Flow, plan: ElisionPlan | None) -> Flow:
    """Only kept slots, with their original positions."""
    hidden, positions, number = flow
    if plan is None or plan.is_dense:
        return flow
    return keep(hidden, plan), positions.gather(1, plan.kept_BK), number


class Head(nn.Module):
    """Stream to (sum of the kept targets' losses, each of them [L]); without a plan, to logits."""

    def __init__(self, norm: nn.Module, head: nn.Module, desk: Desk) -> None:
        super().__init__()
        self.norm, self.head = norm, head
        self._desk = desk

    def forward(self, flow: Flow) -> tuple[Tensor, Tensor, Tensor]:
        hidden, _, number = flow
        plan = self._desk.of(number).plan
        if plan is None:
            return self.head(self.norm(hidden)), hidden.new_zeros(0), number
        # After the gather slots are rows; before it, and in a dense step, slots are positions.
        hidden_LH = hidden.reshape(-1, hidden.shape[-1]).index_select(0, plan.label_slot_L)
        weight, bias = self.head.weight, self.head.bias
        loss_sum, losses_L = summed_loss(self.norm(hidden_LH), weight, bias, plan.targets_L)
        return loss_sum, losses_L, number


def take_apart(host: Any, desk: Desk, *, first_layer: int, needs_tower: bool) -> list[nn.Module]:
    """The layers of a model, which is emptied: what is left of it embeds."""
    decoder = host.get_decoder()
    layers, norm = list(decoder.layers), decoder.norm
    parts: list[nn.Module] = [
        Decoder(layer, decoder.rotary_emb, desk, gathers=number == first_layer - 1)
        for number, layer in enumerate(layers)
    ]
    head = Head(norm, host.get_output_embeddings(), desk)
    decoder.layers, decoder.norm = nn.ModuleList(), nn.Identity()
    embed = Embed(host, desk, gathers=first_layer == 0, needs_tower=needs_tower)
    return [embed, *parts, head]


def names_and_tensors(inputs: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    """A micro-batch's inputs in a fixed order. ValueError if one of them is not a tensor."""
    given = {name: value for name, value in inputs.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"input {name!r} is a {type(value).__name__}: a pipeline carries tensors only; "
                "leave it out, or make it a tensor"
            )
    return tuple(given), tuple(given.values())
