"""Plan a step's window: values, then counts, then one plan for each micro-batch.

The session, `run.plan_only`, the sample picture and the dry run of Megatron's ranks all call these
functions, in this order:

    score_window    one value for each label position of the window
    count_hard      how many of each sample are kept; collective over data ranks
    place_images     the place of each image token, where images are elided
    plan_window     the plans

Shapes: S samples of the window, N label positions, E elidable ones, of these samples.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regate_ds.algorithm.batch import ELIDABLE, SampleKey, TokenBatch
from regate_ds.algorithm.executions.execution import Execution, Ranked
from regate_ds.algorithm.images import ReadOrders, beyond_kept
from regate_ds.algorithm.plan import ElisionPlan, plan_dense
from regate_ds.algorithm.quotas.quota import Exchange, Quota, QuotaState, Samples, alone
from regate_ds.algorithm.rankings.ranking import Ranking
from regate_ds.algorithm.rows import RowLayout, widen
from regate_ds.algorithm.scores.score import Score, ScoreInputs


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is chosen, how much of it, and what becomes of the rest."""

    score: Score
    quota: Quota
    execution: Execution
    keep_share: float
    """Share of the label positions."""

    ranking: Ranking
    image_share: float
    """Share of each image's tokens."""

    fill_rows: bool = False
    """Whether further image tokens take the places of padding (see ``ImagesConfig``)."""

    layers: range = range(0)
    """The gated layers, where the configuration numbers the last one."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was decided about a window before its plans are made."""

    values_N: Tensor
    """fp64: the score of each label position."""

    num_hard_S: Tensor
    """int64: how many of each sample's elidable label positions are hard targets."""

    beyond: tuple[Tensor, ...] | None = None
    """For each micro-batch the places of its image tokens (see ``Ranked``); None keeps them all."""

    step: int = 0
    """The optimizer step."""

    reference_N: Tensor | None = None
    """fp32: the reference store's values, for a choice that is made after the forward pass."""


def window_keys(window: Sequence[TokenBatch]) -> tuple[SampleKey, ...]:
    return tuple(key for batch in window for key in batch.flat_keys)


def score_window(
    method: Method,
    window: Sequence[TokenBatch],
    *,
    step: int,
    reference_N: Tensor | None,
    statistics: Mapping[str, Tensor],
) -> Tensor:
    """Return one fp64 value for each label position [N].

    ValueError if the score returns something else, RuntimeError if a value cannot be ranked.
    """
    counts = [count for batch in window for count in batch.num_labels_per_sample]
    inputs = ScoreInputs(
        step=step,
        keys=window_keys(window),
        num_labels_S=torch.tensor(counts, dtype=torch.int64),
        reference_N=reference_N,
        statistics=statistics,
    )
    values_N = _one_each(method.score, method.score(inputs), sum(counts)).double()
    # A position that never ran may be at infinity: it is kept first.
    may_be_unseen = any(one.unseen == torch.inf for one in method.score.statistics)
    is_bad_N = ~values_N.isfinite() & ~((values_N == torch.inf) & may_be_unseen)
    if bool(is_bad_N.any()):
        raise RuntimeError(
            f"the score {type(method.score).__name__} is {float(values_N[is_bad_N][0])} at a label "
            "position; if it reads losses, one of them is not finite: check the reference store "
            "with `regate store verify`, or resume from an earlier checkpoint"
        )
    return values_N


def count_hard(
    method: Method,
    window: Sequence[TokenBatch],
    values_N: Tensor,
    *,
    exchange: Exchange = alone,
    state: QuotaState,
) -> tuple[Tensor, QuotaState]:
    """Return the number of hard targets of each sample (int64 [S]) and the quota's new state.

    Collective over data ranks where the quota looks at all of them.
    """
    is_elidable = [(batch.kind_BT == ELIDABLE)[batch.is_label_BT] for batch in window]
    samples = Samples(window_keys(window), num_elidable(window))
    values_E = values_N[torch.cat(is_elidable)]
    return method.quota.count(
        values_E, samples, keep_share=method.keep_share, exchange=exchange, state=state
    )


def place_images(
    method: Method, window: Sequence[TokenBatch], *, step: int, read_orders: ReadOrders | None
) -> tuple[Tensor, ...]:
    """Return for each micro-batch the places of its image tokens (see ``Ranked``).

    ValueError as ``beyond_kept``.
    """
    share = method.image_share
    return tuple(
        beyond_kept(method.ranking, batch, keep_share=share, step=step, read_orders=read_orders)
        for batch in window
    )


def plan_window(
    method: Method, window: Sequence[TokenBatch], choice: Choice, rows: RowLayout
) -> tuple[ElisionPlan, ...]:
    """Return the plan of each micro-batch in a sparse step.

    ValueError if the quota has not given each sample a number that it has.
    """
    num_S, num_hard_S = num_elidable(window), choice.num_hard_S
    _one_each(method.quota, num_hard_S, len(num_S))
    if num_hard_S.is_floating_point() or bool(((num_hard_S < 0) | (num_hard_S > num_S)).any()):
        raise ValueError(
            f"the quota {type(method.quota).__name__} keeps {num_hard_S.tolist()} of samples with "
            f"{num_S.tolist()} positions; count must return whole numbers between 0 and these"
        )
    sizes = [batch.num_labels for batch in window]
    values = choice.values_N.split(sizes)
    references = choice.reference_N.split(sizes) if choice.reference_N is not None else None
    counts = num_hard_S.split([len(batch.flat_keys) for batch in window])
    ranked = [
        Ranked(
            score_BT=batch.at_labels(values_n),
            num_hard_S=counts_s,
            beyond_BT=beyond_BT,
            fills_rows=method.fill_rows,
            step=choice.step,
            keep_share=method.keep_share,
            layers=method.layers,
            reference_BT=None if reference_n is None else batch.at_labels(reference_n),
        )
        for batch, values_n, counts_s, beyond_BT, reference_n in zip(
            window,
            values,
            counts,
            choice.beyond or [None] * len(window),
            references or [None] * len(window),
            strict=True,
        )
    ]
    plans = [
        method.execution.plan(batch, one, rows) for batch, one in zip(window, ranked, strict=True)
    ]
    if rows.equal:
        longest = max(plan.num_slots for plan in plans)
        plans = [widen(plan, longest) for plan in plans]
    return tuple(replace(plan, micro=number) for number, plan in enumerate(plans))


def num_elidable(window: Sequence[TokenBatch]) -> Tensor:
    """Return the number of elidable label positions of each sample: int64 [S]."""
    return torch.cat([batch.num_elidable_S for batch in window])


def plan_dense_window(window: Sequence[TokenBatch]) -> tuple[ElisionPlan, ...]:
    """Return the plan of each micro-batch in a dense step."""
    return tuple(replace(plan_dense(batch), micro=number) for number, batch in enumerate(window))


def _one_each(maker: object, found: Any, num: int) -> Tensor:
    """Refuse what is no tensor with ``num`` values; ``maker`` is the score or quota it is from."""
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != (num,):
        raise ValueError(
            f"{type(maker).__name__} returned {shape}; it must return a tensor of shape ({num},)"
        )
    return found
