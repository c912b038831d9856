"""Turn a Hugging Face language model into the flat list of layers that a DeepSpeed pipeline needs.

Layers pass on a tuple of tensors: the residual stream, its positions, and the number of the
micro-batch. Each stage looks up the plan of that number, so that a layer finds the right plan under
1F1B and under activation recomputation.

    embed        embeds the text, and the images if there are any
    decoder i    one decoder layer; the one before the gated range ends with the gather
    head         final norm, output layer and loss, at kept targets only

The number is passed on as the length of a tensor, which is known without waiting for the device.

Shapes: B rows, T positions, S = T before the gather and K slots after it, H hidden, L targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.adapters.huggingface.calls import require_rows, window_of
from regate_ds.adapters.huggingface.empty_image import call_with_tower
from regate_ds.adapters.huggingface.tower_calls import IMAGE, VIDEO, tower_calls_of
from regate_ds.algorithm.gate import keep
from regate_ds.algorithm.loss import summed_loss
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.data.collate import Batch

Flow = tuple[Tensor, Tensor, Tensor]
"""Residual stream [B, S, H], its positions [B, S], and what ``numbered`` made of the number."""


@dataclass
class Micro:
    """What a stage knows about a micro-batch besides its tensors."""

    plan: ElisionPlan | None
    """None if the run is the host's own, without elision."""

    names: tuple[str, ...] = ()
    """Names of the model inputs, in the order of the tensors that the first stage receives."""


@dataclass
class MicroBatchTable:
    """The micro-batches of the current step, by number; all layers of a stage share one table."""

    micro: Sequence[Micro] = field(default_factory=tuple)

    def look_up(self, number: Tensor) -> Micro:
        """Return the micro-batch whose number ``numbered`` put into the tensor."""
        return self.micro[len(number) - 1]


def numbered(number: int, device: torch.device) -> Tensor:
    """Return a tensor whose length says the number of a micro-batch: number + 1."""
    return torch.zeros(number + 1, dtype=torch.uint8, device=device)


class Embed(nn.Module):
    """Embed the model inputs: this is the host's base model without its decoder layers."""

    def __init__(
        self, host: nn.Module, table: MicroBatchTable, *, gathers: bool, needs_tower: bool
    ) -> None:
        super().__init__()
        self.base_model: Any = host.base_model
        # In a tuple the host is not a submodule, which would own the layers of all stages.
        self._host = (host,)
        self._table, self._gathers, self._needs_tower = table, gathers, needs_tower
        # Where both reach weights of their own, every micro-batch runs both, so that ranks agree.
        self._calls = (IMAGE, VIDEO) if tower_calls_of(host).by_kind else None

    def forward(self, inputs: tuple[Tensor, ...]) -> Flow:
        *tensors, number = inputs
        micro = self._table.look_up(number)
        named = dict(zip(micro.names, tensors, strict=True))
        positions = named.pop("position_ids", None)
        # Padding is on the right, where causal attention hides it from real tokens.
        named.pop("attention_mask", None)
        call = partial(self.base_model, use_cache=False)
        outputs = (
            call_with_tower(call, self._host[0], named, self._calls)
            if self._needs_tower
            else call(**named)
        )
        hidden = outputs.last_hidden_state
        if (plan := micro.plan) is not None:
            patches = plan.patches
            require_rows(hidden, plan, None if patches is None else patches.row_length)
        _require_within_window(self._host[0], hidden.shape[1])
        if positions is None:
            positions = torch.arange(hidden.shape[1], device=hidden.device)
            positions = positions.expand(hidden.shape[:2])
        # A tensor that is sent to the next stage must be contiguous.
        flow = (hidden, positions.contiguous(), number)
        return gathered(flow, micro.plan) if self._gathers else flow


def _require_within_window(host: Any, num_tokens: int) -> None:
    window = window_of(host)
    if window is not None and num_tokens >= window:
        raise ValueError(
            f"a row of {num_tokens} tokens reaches the attention window of {window}, which a "
            "pipeline does not apply; use shorter rows, or train without a pipeline"
        )


class Decoder(nn.Module):
    """One decoder layer of the host."""

    def __init__(
        self, layer: nn.Module, rotary: nn.Module, table: MicroBatchTable, *, gathers: bool
    ) -> None:
        super().__init__()
        self.layer, self.rotary = layer, rotary
        self._table, self._gathers = table, gathers

    def forward(self, flow: Flow) -> Flow:
        hidden, positions, number = flow
        hidden = self.layer(
            hidden,
            # A row holds one sample with its padding at the end, so the mask is causal order alone.
            attention_mask=self._mask(hidden),
            position_embeddings=self.rotary(hidden, positions),
        )
        flow = (hidden, positions, number)
        return gathered(flow, self._table.look_up(number).plan) if self._gathers else flow

    def _mask(self, hidden: Tensor) -> Tensor | None:
        """Return the causal mask that eager attention needs; other attention needs none."""
        if self.layer.self_attn.config._attn_implementation != "eager":
            return None
        lowest, size = torch.finfo(hidden.dtype).min, hidden.shape[1]
        return hidden.new_full((1, 1, size, size), lowest).triu(1)


def gathered(flow: Flow, plan: ElisionPlan | None) -> Flow:
    """Return the flow of kept slots only, with their original positions.

    It is the flow itself if the plan moves no rows.
    """
    hidden, positions, number = flow
    if plan is None or not plan.moves_rows:
        return flow
    return keep(hidden, plan), positions.gather(1, plan.kept_BK), number


class Head(nn.Module):
    """Compute the sum of the kept targets' losses, each loss [L] and, if asked for, each entropy
    [L], else [0]; without a plan, the logits."""

    def __init__(
        self, norm: nn.Module, head: nn.Module, table: MicroBatchTable, *, with_entropy: bool
    ) -> None:
        super().__init__()
        self.norm, self.head = norm, head
        self._table, self._with_entropy = table, with_entropy

    def forward(self, flow: Flow) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden, _, number = flow
        plan, none = self._table.look_up(number).plan, hidden.new_zeros(0)
        if plan is None:
            return self.head(self.norm(hidden)), none, none, number
        loss_sum, losses_L, entropy_L = self._summed(hidden.reshape(-1, hidden.shape[-1]), plan)
        return loss_sum, losses_L, none if entropy_L is None else entropy_L, number

    def _summed(self, rows: Tensor, plan: ElisionPlan) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what ``summed_loss`` does, of all rows [B * S, H] of a micro-batch."""
        # Where the plan moves no rows, slots are positions.
        return summed_loss(
            self.norm(rows.index_select(0, plan.label_slot_L)),
            self.head.weight,
            self.head.bias,
            plan.targets_L,
            plan.weight_L,
            with_entropy=self._with_entropy,
        )


def take_apart(  # noqa: PLR0913 (a word for each thing that layers must know)
    host: Any,
    table: MicroBatchTable,
    *,
    first_layer: int,
    needs_tower: bool,
    with_entropy: bool,
    ends: tuple[type[Embed], type[Head]] = (Embed, Head),
) -> list[nn.Module]:
    """Return the layers of a model as a list, and remove them from the model.

    What is left of the model is the first entry of the list, which embeds. ends: the kinds of the
    first and the last one.
    """
    embed_kind, head_kind = ends
    decoder = host.get_decoder()
    layers, norm = list(decoder.layers), decoder.norm
    parts: list[nn.Module] = [
        Decoder(layer, decoder.rotary_emb, table, gathers=number == first_layer - 1)
        for number, layer in enumerate(layers)
    ]
    head = head_kind(norm, host.get_output_embeddings(), table, with_entropy=with_entropy)
    decoder.layers, decoder.norm = nn.ModuleList(), nn.Identity()
    embed = embed_kind(host, table, gathers=first_layer == 0, needs_tower=needs_tower)
    return [embed, *parts, head]


def inputs_and_labels(batch: Any) -> tuple[dict[str, Any], Any]:
    """Return the model inputs of a micro-batch, ours or the host's own, and its labels."""
    if isinstance(batch, Batch):
        return batch.inputs, batch.tokens.labels_BT
    inputs = dict(batch)
    return inputs, inputs.pop("labels", torch.zeros(0))


def names_and_tensors(inputs: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    """Return the names and the values of a micro-batch's inputs, in the same order.

    Inputs that are None are left out. ValueError if an input is not a tensor.
    """
    given = {name: value for name, value in inputs.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"input {name!r} is a {type(value).__name__}, but a pipeline passes on tensors "
                "only; leave it out, or make it a tensor"
            )
    return tuple(given), tuple(given.values())
