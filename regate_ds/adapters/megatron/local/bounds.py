"""Hold the samples of a plan against those that the host's attention keeps apart.

A plan that takes a packed row for one sample, or the other way round, would be carried out without
an error, and samples would see each other in some layers and not in others.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from torch import Tensor

from regate_ds.algorithm.plan import ElisionPlan


def require_same_samples(
    plan: ElisionPlan,
    packed: Any,
    *,
    has_mask: bool,
    looks: bool,
    cut: tuple[int, ...] | None = None,
) -> None:
    """Refuse, by ValueError, a model call whose rows hold other samples than the plan.

    packed: the host's PackedSeqParams, or None. has_mask: whether the call has an attention mask,
    which may keep samples apart too. looks: whether bounds on a GPU are read, which waits for it;
    else they are only counted, and read where their number is another. cut: the lengths that
    context ranks cut each by itself, if there are several; the bounds must then be theirs.
    """
    if getattr(packed, "qkv_format", None) != "thd":
        if not has_mask and plan.is_packed:
            raise ValueError(
                f"the plan has {len(plan.sample_lengths)} samples in {len(plan.kept_BK)} rows, but "
                "the model is called without packed_seq_params, so that they would see each other; "
                "give it the samples' bounds (qkv_format='thd'), or plan one sample a row"
            )
        return
    starts = plan.sample_starts.tolist()
    # Where the host fills samples up, these are their places, and cu_seqlens_q tells their lengths.
    padded: Tensor | None = packed.cu_seqlens_q_padded
    bounds: Tensor = packed.cu_seqlens_q if padded is None else padded
    if not (bounds.is_cpu or looks) and len(bounds) - 1 - len(starts) in (0, 1):
        return
    host = bounds.tolist()
    if cut is not None and sorted(set(host)) != [*accumulate(cut, initial=0)]:
        raise ValueError(
            f"the model is called with packed rows whose samples have the bounds {_shown(host)} "
            "(cu_seqlens_q_padded), but those that context ranks cut by the plan are "
            f"{_shown([*accumulate(cut, initial=0)])}: each sample filled up, then the rest of the "
            "row; make both the same"
        )
    # Behind the last sample the host may count padding as one more.
    last = int(plan.position_R.max())
    is_same = set(starts) <= set(host) and not {b for b in host if b <= last} - set(starts)
    if not is_same:
        raise ValueError(
            f"the model is called with packed rows whose samples have the bounds {_shown(host)} "
            f"(packed_seq_params), but those of the plan start at {starts[:8]}; make `tokens` tell "
            "the same samples"
        )


def _shown(bounds: list[int]) -> str:
    return f"[{', '.join(map(str, bounds[:8]))}{', ...' if len(bounds) > 8 else ''}]"
