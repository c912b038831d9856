"""Hooks on the chunks of a Megatron-core model: where kept rows leave the full sequence.

A plan travels as a ``Carrier`` in the place of ``packed_seq_params``, which GPTModel hands to its
decoder, and the decoder to each layer's attention; activation recomputation captures it there. It
is taken off before attention, which sees the host's own parameters.

    output of layer first_layer - 1   the kept rows (before the decoder if first_layer is 0)
    attention of gated layers         positions, bounds and mask of kept rows
    output of layer last_layer - 1    the full rows (before the decoder if last_layer is its first)
    output of the decoder             the rows that have a target; labels are theirs
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from regate_ds.adapters.attachment import Attachment
from regate_ds.adapters.megatron.bypass import Bypass, Channel
from regate_ds.adapters.megatron.local_plan import LocalPlan
from regate_ds.parallel.resharding import move_rows


@dataclass
class Carrier(PackedSeqParams):
    """A micro-batch's plan on its way through one model chunk."""

    local: LocalPlan | None = None
    host: PackedSeqParams | None = None
    """What the host's attention would have been given."""

    rotary: Tensor | None = None
    """Rotary angles at the kept positions."""

    bypass: Bypass | None = None
    """The elided rows, where the gated range ends before the decoder does."""


def carry(local: LocalPlan, host: PackedSeqParams | None) -> Carrier:
    """As the host's parameters, where it has any; else what makes rotary tables full length."""
    length = local.plan.num_tokens
    own = {"qkv_format": "sbhd", "max_seqlen_q": length, "max_seqlen_kv": length}
    if host is not None:
        own = {f.name: getattr(host, f.name) for f in fields(PackedSeqParams)}
    return Carrier(**own, local=local, host=host)


@dataclass(frozen=True, kw_only=True)
class Range:
    """The gated layers of the whole model, and the groups that rows move in."""

    first: int
    last: int
    ends_early: bool
    split: ProcessGroup | None
    """Ranks that hold parts of one sequence."""

    sequence: ProcessGroup | None
    """Tensor ranks under sequence parallelism."""

    channel: Channel | None = None
    """What elided rows take where the gather and the restore are on two stages."""


class ChunkGate:
    """The hooks of one chunk. ``pending`` is the plan of the forward call that comes next."""

    def __init__(self, gpt: nn.Module, gated: Range, attachment: Attachment) -> None:
        self.gpt, self.gated = gpt, gated
        self.layers: list[int] = [layer.layer_number - 1 for layer in gpt.decoder.layers]
        self.pending: LocalPlan | None = None
        self._signature = inspect.signature(type(gpt).forward)
        self._register(attachment)

    def _register(self, attachment: Attachment) -> None:
        def before(module: nn.Module, hook: Any) -> None:
            attachment.add_hook(module.register_forward_pre_hook(hook, with_kwargs=True))

        def after(module: nn.Module, hook: Any) -> None:
            attachment.add_hook(module.register_forward_hook(hook, with_kwargs=True))

        before(self.gpt, self._enter)
        before(self.gpt.decoder, self._before_decoder)
        if self.gpt.post_process:
            after(self.gpt.decoder, self._after_decoder)
        for number, layer in zip(self.layers, self.gpt.decoder.layers, strict=True):
            gated = self.gated.first <= number < self.gated.last
            before(layer.self_attention, self._before_gated if gated else self._before_ungated)
            if gated:
                before(layer, self._enter_gated)
            if number == self.gated.first - 1:
                after(layer, self._gather_output)
            if number == self.gated.last - 1 and self.gated.last in self.layers:
                after(layer, self._restore_output)

    def _enter(self, gpt: nn.Module, args: Any, kwargs: Any) -> Any:
        local, self.pending = self.pending, None
        if local is None:
            return None
        given = self._signature.bind(gpt, *args, **kwargs).arguments
        given = {name: value for name, value in given.items() if name != "self"}
        host = given.get("packed_seq_params")
        if getattr(host, "qkv_format", None) == "thd" and gpt.config.context_parallel_size > 1:
            raise ValueError(
                "the model is called with packed rows (packed_seq_params, thd), which are not "
                "supported with context parallelism; give one sample a row"
            )
        carrier = carry(local, host)
        if self.gated.ends_early and not local.is_dense:
            carrier.bypass = Bypass(local, self.gated.channel)
        given["packed_seq_params"] = carrier
        if gpt.post_process:
            # The host's labels are of the full sequence; the plan has those of its own rows.
            given |= {"labels": local.targets_P[None], "loss_mask": None}
        return (), given

    def _before_decoder(self, decoder: nn.Module, args: Any, kwargs: Any) -> Any:
        carrier = kwargs.get("packed_seq_params")
        if isinstance(carrier, Carrier) and self.gpt.pre_process:
            _require_planned(kwargs["hidden_states"], carrier.local)
        if (carrier := _eliding(kwargs)) is None:
            return None
        carrier.rotary = self._rotary(carrier.local)
        if self.gated.first == 0 and self.gpt.pre_process:
            hidden = self._gathered(kwargs["hidden_states"], carrier)
            return args, {**kwargs, "hidden_states": hidden}
        if self.gated.last == self.layers[0]:
            decoder.set_input_tensor(self._restored(decoder.input_tensor, carrier))
        return None

    def _rotary(self, local: LocalPlan) -> Tensor | None:
        if self.gpt.position_embedding_type != "rope":
            return None
        # The whole table, not this context rank's slice of it: kept slots are cut anew.
        table = self.gpt.rotary_pos_emb.get_emb(local.plan.num_tokens)
        return table[:, 0, 0][local.rotary_position].unsqueeze(2)

    def _gathered(self, hidden: Tensor, carrier: Carrier) -> Tensor:
        local = carrier.local
        if carrier.bypass is not None:
            hidden = carrier.bypass.leave(hidden)
        return move_rows(hidden, local.gather, local.kept_shape, self.gated.split)

    def _restored(self, hidden: Tensor, carrier: Carrier) -> Tensor:
        local = carrier.local
        full = move_rows(hidden, local.gather.reversed, local.full_shape, self.gated.split)
        return carrier.bypass.join(full)

    def _gather_output(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if (carrier := _eliding(kwargs)) is None:
            return None
        hidden, *rest = output
        return (self._gathered(hidden, carrier), *rest)

    def _restore_output(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if (carrier := _eliding(kwargs)) is None:
            return None
        hidden, *rest = output
        return (self._restored(hidden, carrier), *rest)

    def _enter_gated(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        carrier = _eliding(kwargs)
        if carrier is None or "padding_mask" not in kwargs:
            return None
        return args, {**kwargs, "padding_mask": carrier.local.padding_BK}

    def _before_ungated(self, attention: nn.Module, args: Any, kwargs: Any) -> Any:
        carrier = kwargs.get("packed_seq_params")
        if not isinstance(carrier, Carrier):
            return None
        return args, {**kwargs, "packed_seq_params": carrier.host}

    def _before_gated(self, attention: nn.Module, args: Any, kwargs: Any) -> Any:
        if (carrier := _eliding(kwargs)) is None:
            return self._before_ungated(attention, args, kwargs)
        return args, {
            **kwargs,
            "rotary_pos_emb": carrier.rotary,
            # Causal order is enough: padding comes after all real slots.
            "attention_mask": None,
            "packed_seq_params": _bounds(carrier.local),
        }

    def _after_decoder(self, decoder: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        carrier = kwargs.get("packed_seq_params")
        if not isinstance(carrier, Carrier):
            return None
        local = carrier.local
        num_rows = local.head_shape[0]
        if self.gated.sequence is not None:
            num_rows //= torch.distributed.get_world_size(self.gated.sequence)
        return move_rows(output, local.head, (num_rows, 1), self.gated.sequence)


def _eliding(kwargs: dict[str, Any]) -> Any:
    """The ``Carrier`` of a micro-batch of which something is elided, else ``None``."""
    carrier = kwargs.get("packed_seq_params")
    return carrier if isinstance(carrier, Carrier) and not carrier.local.is_dense else None


def _require_planned(hidden: Tensor, local: LocalPlan) -> None:
    """Refuse what is not the rows of the plan: others would be gathered in silence."""
    found = tuple(hidden.shape[:2])
    if found != local.full_shape:
        raise ValueError(
            f"the decoder is given {found} rows [sequence, batch] on this rank, the plan is of "
            f"{local.full_shape}; `tokens` must tell labels of all that the decoder sees, with the "
            "positions of images among them"
        )


def _bounds(local: LocalPlan) -> PackedSeqParams | None:
    packing = local.packing
    if packing is None:
        return None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=packing.cumulative,
        cu_seqlens_kv=packing.cumulative,
        max_seqlen_q=packing.longest,
        max_seqlen_kv=packing.longest,
    )
