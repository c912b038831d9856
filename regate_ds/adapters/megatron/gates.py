"""Hook into the chunks of a Megatron-core model, to run gated layers on kept rows only.

A plan travels as a ``Carrier`` in the place of ``packed_seq_params``. GPTModel passes that argument
to its decoder, and the decoder passes it to each layer's attention, so activation recomputation
captures it with the other arguments. Before attention the carrier is replaced by what the host's
attention takes.

    output of layer first_layer - 1   becomes the kept rows (decoder input if first_layer is 0)
    attention of gated layers         gets positions, bounds and mask of kept rows
    output of layer last_layer - 1    becomes the full rows (decoder input if last_layer is first)
    output of the decoder             becomes the rows that have a target; labels are theirs

In a merged step all layers are gated, whatever the range: the decoder's input becomes the patches,
and nothing is restored; the logits of a patch are repeated for each of its targets.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from regate_ds.adapters.attachment import Attachment
from regate_ds.adapters.megatron.bypass import Bypass, Channel
from regate_ds.adapters.megatron.carrier import Carrier, bounds_of, by_name, carry, eliding, gating
from regate_ds.adapters.megatron.deepstack import moved_features, rebind_additions
from regate_ds.adapters.megatron.entropy import EntropyTap
from regate_ds.adapters.megatron.local.bounds import require_same_samples
from regate_ds.adapters.megatron.local.latent import OwnAngles
from regate_ds.adapters.megatron.local.plan import LocalPlan
from regate_ds.adapters.megatron.local.rotary import kept_angles, require_one_axis, whole_positions
from regate_ds.parallel.resharding import move_rows


@dataclass(frozen=True, kw_only=True)
class Range:
    """The gated layers of the whole model, and the groups in which rows move."""

    first: int
    """Index of the first gated layer."""

    last: int
    """Index after the last gated layer."""

    ends_early: bool
    """Whether the gated range ends before the model's last layer."""

    split: ProcessGroup | None
    """Ranks that hold parts of one sequence; None if one rank holds all of it."""

    sequence: ProcessGroup | None
    """Tensor ranks under sequence parallelism, else None."""

    context: ProcessGroup | None
    """Context ranks, if there are several; else None."""

    channel: Channel | None = None
    """What elided rows travel by if the gather and the restore are on two stages; else None."""


class ChunkGate:
    """The hooks of one chunk. ``pending`` is the plan of the next forward call, or None."""

    def __init__(
        self, gpt: nn.Module, gated: Range, attachment: Attachment, *, merges: bool = False
    ) -> None:
        """merges: whether some steps are merged."""
        self.gpt, self.gated, self._merges = gpt, gated, merges
        self.layers: list[int] = [layer.layer_number - 1 for layer in gpt.decoder.layers]
        self.pending: LocalPlan | None = None
        self.entropy: EntropyTap | None = None
        """Set on the chunk that has the head, if the score asks for entropies."""
        self._own_angles = OwnAngles()
        self._times = 1
        """How often the logits of each row are needed, at the call of the head that comes."""
        self._has_looked = False
        """Whether a call's samples have been read once."""
        self._signature = inspect.signature(type(gpt).forward)
        self._register(attachment)

    def range_of(self, local: LocalPlan) -> Range:
        """Return the layers that such a plan gates: in a merged step, all."""
        if local.members is None:
            return self.gated
        num_layers = self.gpt.config.num_layers
        return replace(self.gated, first=0, last=num_layers, ends_early=False, channel=None)

    def _register(self, attachment: Attachment) -> None:
        def before(module: nn.Module, hook: Any) -> None:
            attachment.add_hook(module.register_forward_pre_hook(hook, with_kwargs=True))

        def after(module: nn.Module, hook: Any) -> None:
            attachment.add_hook(module.register_forward_hook(hook, with_kwargs=True))

        # Not a hook: models around a GPTModel may call its forward itself, past all hooks.
        attachment.rebind_forward(self.gpt, self._forward)
        rebind_additions(self.gpt.decoder, attachment)
        before(self.gpt.decoder, self._before_decoder)
        if self.gpt.post_process:
            after(self.gpt.decoder, self._after_decoder)
            if self._merges:
                after(self.gpt.output_layer, self._after_head)
        for number, layer in zip(self.layers, self.gpt.decoder.layers, strict=True):
            in_range = self.gated.first <= number < self.gated.last
            before(layer.self_attention, partial(self._before_attention, in_range))
            if in_range or self._merges:
                before(layer, partial(self._enter_layer, in_range))
                self._own_angles.rebind(layer.self_attention, attachment)
            if number == self.gated.first - 1:
                after(layer, self._gather_output)
            if number == self.gated.last - 1 and self.gated.last in self.layers:
                after(layer, self._restore_output)

    def _forward(self, host_forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward call, with the pending plan in its arguments."""
        local, self.pending = self.pending, None
        if local is None:
            return host_forward(*args, **kwargs)
        return host_forward(**self._entered(local, args, kwargs))

    def _entered(self, local: LocalPlan, args: Any, kwargs: Any) -> dict[str, Any]:
        """Return the arguments of a forward call with the plan among them."""
        gpt: Any = self.gpt
        arguments = by_name(self._signature, gpt, args, kwargs)
        host = arguments.get("packed_seq_params")
        if local.cut is not None and getattr(host, "qkv_format", None) == "thd":
            require_one_axis(gpt)
        has_mask, looks = arguments.get("attention_mask") is not None, not self._has_looked
        require_same_samples(local.plan, host, has_mask=has_mask, looks=looks, cut=local.cut)
        self._has_looked = True
        carrier = carry(local, host)
        given = arguments.get("position_ids")
        carrier.position_ids = whole_positions(gpt, local, given, self.gated.context)
        if self.gated.ends_early and local.moves_rows and local.members is None:
            carrier.bypass = Bypass(local, self.gated.channel)
        arguments["packed_seq_params"] = carrier
        if gpt.post_process:
            # The host's labels are of the full sequence; the plan has the labels of its own rows.
            arguments |= {"labels": local.targets_P[None], "loss_mask": None}
        return arguments

    def _before_decoder(self, decoder: nn.Module, args: Any, kwargs: Any) -> Any:
        carrier = kwargs.get("packed_seq_params")
        if isinstance(carrier, Carrier) and self.gpt.pre_process:
            _require_planned(kwargs["hidden_states"], carrier.local)
        if (carrier := eliding(kwargs)) is None:
            return None
        carrier.rotary = kept_angles(self.gpt, carrier.local, carrier.position_ids)
        is_merged = carrier.local.members is not None
        if self.gated.last == self.layers[0] and not is_merged:
            decoder.set_input_tensor(self._restored(decoder.input_tensor, carrier))
        if not self.gpt.pre_process:
            return None
        move = partial(self._moved, carrier.local)
        kwargs = moved_features(kwargs, self.layers, self.gated.first - 1, move)
        if self.gated.first == 0 or is_merged:
            kwargs = {**kwargs, "hidden_states": self._gathered(kwargs["hidden_states"], carrier)}
        return args, kwargs

    def _moved(self, local: LocalPlan, hidden: Tensor) -> Tensor:
        how = (local.gather, local.kept_shape, self.gated.split)
        if local.members is not None:
            return local.members.merged(hidden, *how)
        return move_rows(hidden, *how)

    def _gathered(self, hidden: Tensor, carrier: Carrier) -> Tensor:
        if carrier.bypass is not None:
            hidden = carrier.bypass.leave(hidden)
        return self._moved(carrier.local, hidden)

    def _restored(self, hidden: Tensor, carrier: Carrier) -> Tensor:
        local = carrier.local
        full = move_rows(hidden, local.gather.reversed, local.full_shape, self.gated.split)
        return carrier.bypass.join(full)

    def _gather_output(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if (carrier := eliding(kwargs)) is None or carrier.local.members is not None:
            return None
        hidden, *rest = output
        return (self._gathered(hidden, carrier), *rest)

    def _restore_output(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if (carrier := eliding(kwargs)) is None or carrier.local.members is not None:
            return None
        hidden, *rest = output
        return (self._restored(hidden, carrier), *rest)

    def _enter_layer(self, in_range: bool, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        carrier = gating(kwargs, in_range)
        if carrier is None or "padding_mask" not in kwargs:
            return None
        return args, {**kwargs, "padding_mask": carrier.local.padding_BK}

    def _before_attention(
        self, in_range: bool, attention: nn.Module, args: Any, kwargs: Any
    ) -> Any:
        carrier = gating(kwargs, in_range)
        self._own_angles.local = None if carrier is None else carrier.local
        if carrier is None:
            carrier = kwargs.get("packed_seq_params")
            if not isinstance(carrier, Carrier):
                return None
            return args, {**kwargs, "packed_seq_params": carrier.host}
        return args, {
            **kwargs,
            "rotary_pos_emb": carrier.rotary,
            # Causal attention needs no mask, because padding comes after all real slots.
            "attention_mask": None,
            "packed_seq_params": bounds_of(carrier.local),
        }

    def _after_decoder(self, decoder: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        carrier, self._times = kwargs.get("packed_seq_params"), 1
        if not isinstance(carrier, Carrier):
            return None
        local = carrier.local
        if local.members is not None:
            self._times = local.members.size
        num_rows = local.num_head_rows
        if self.gated.sequence is not None:
            num_rows //= torch.distributed.get_world_size(self.gated.sequence)
        return move_rows(output, local.head, (num_rows, 1), self.gated.sequence)

    def _after_head(self, head: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        times, self._times = self._times, 1
        if times == 1:
            return None
        logits, *rest = output
        each = logits.unsqueeze(1).expand(-1, times, *logits.shape[1:])
        # A copy of one row, too: the host's loss works in place.
        return (each.flatten(0, 1).contiguous(), *rest)


def _require_planned(hidden: Tensor, local: LocalPlan) -> None:
    """Refuse an input whose shape is not the plan's, because other rows would be gathered."""
    found = tuple(hidden.shape[:2])
    if found != local.full_shape:
        raise ValueError(
            f"the decoder is given {found} rows [sequence, batch] on this rank, the plan is of "
            f"{local.full_shape}; make `tokens` give a label for every position that the decoder "
            "sees, positions of images included"
        )
