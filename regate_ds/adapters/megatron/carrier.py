"""The form in which a plan travels through a model: in the place of ``packed_seq_params``."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from regate_ds.adapters.megatron.bypass import Bypass
from regate_ds.adapters.megatron.local.plan import LocalPlan


@dataclass
class Carrier(PackedSeqParams):
    """A micro-batch's plan, in the form in which it passes through one model chunk."""

    local: LocalPlan | None = None
    host: PackedSeqParams | None = None
    """The parameters that the host would give to attention; None if it gives none."""

    position_ids: Tensor | None = None
    """Those that the model was called with."""

    rotary: Tensor | None = None
    """Rotary angles at the kept positions."""

    bypass: Bypass | None = None
    """The elided rows, if the gated range ends before the decoder does; else None."""


def carry(local: LocalPlan, host: PackedSeqParams | None) -> Carrier:
    """Make the carrier of a plan, with the values of the host's parameters if there are any.

    Without them it has the values that make the host build rotary tables of full length.
    """
    length = local.plan.num_tokens
    values = {"qkv_format": "sbhd", "max_seqlen_q": length, "max_seqlen_kv": length}
    if host is not None:
        values = {f.name: getattr(host, f.name) for f in fields(PackedSeqParams)}
    return Carrier(**values, local=local, host=host)


def eliding(kwargs: dict[str, Any]) -> Any:
    """Return the ``Carrier`` of a micro-batch with elided tokens, else ``None``."""
    carrier = kwargs.get("packed_seq_params")
    return carrier if isinstance(carrier, Carrier) and carrier.local.moves_rows else None


def gating(kwargs: dict[str, Any], in_range: bool) -> Any:
    """Return the ``Carrier`` by which a layer runs on fewer rows, else ``None``.

    in_range: whether the layer is in the range that is gated where steps are not merged.
    """
    carrier = eliding(kwargs)
    is_gated = carrier is not None and (in_range or carrier.local.members is not None)
    return carrier if is_gated else None


def bounds_of(local: LocalPlan) -> PackedSeqParams | None:
    """Return the bounds of samples in ragged rows for the host's attention; None if padded."""
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


def by_name(signature: inspect.Signature, module: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a method's call by their names, without the module."""
    _, *given = signature.bind(module, *args, **kwargs).arguments.items()
    named = dict(given)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named
