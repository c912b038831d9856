"""The contract of an execution: from values and counts to a plan, and what layers do with it.

A plan says which positions a micro-batch's kept set holds and on which targets the loss runs. The
*spans* say what layers make of it: in a span, either kept rows alone enter a part of each layer, or
all rows do. What is not in a span is the host's own.

    execution      kept set                      span over the gated layers      loss on
    elide          what must stay, chosen        one, part "layer"               kept labels
    elide_images   all but unchosen images       one, part "layer"               chosen labels
    loss_only      everything                    none                            chosen labels
    none           everything                    none                            all labels
    weighted       everything                    none                            all, weighed
    after_forward  everything                    none                            chosen by own loss
    backward_only  what must stay, chosen        one, part "backward"            all labels
    mlp_only       what must stay, chosen        one, part "mlp"                 kept labels
    random_ltd     a random set for each layer   one a layer, each its own set   all labels

``part`` says what of a layer kept rows alone pass through: the "layer" with its mixer, the "mlp"
branch from its norm to its residual addition, or the "backward" pass, where the others enter
detached. A slot is a position or, in a merged step, a patch of several that predicts several
targets: therefore ``ElisionPlan.label_slot_L`` may name a slot several times, and targets and
weights are fields of their own. Merged steps are a phase before these executions: see `merge.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, Protocol

from torch import Tensor

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.algorithm.rows import RowLayout


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A micro-batch's positions as score, quota and ranking see them."""

    score_BT: Tensor
    """fp64: the score of each label position."""

    num_hard_S: Tensor
    """int64: how many of each sample's elidable label positions are hard targets."""

    beyond_BT: Tensor | None = None
    """int64: an image token's place in its image's order, less the number kept: below 0 is kept,
    and the lowest others are the next best. None keeps every image token."""

    fills_rows: bool = False
    """Whether image tokens that are next take the places of padding in padded rows."""

    step: int = 0
    """The optimizer step."""

    keep_share: float = 1.0
    """The share that the step keeps, of which ``num_hard_S`` are made."""

    layers: range = range(0)
    """The gated layers, where the configuration numbers the last one."""

    reference_BT: Tensor | None = None
    """fp32: the reference store's value of each label position, where the choice is made after the
    forward pass and the score reads a store."""


Part = Literal["layer", "mlp", "backward"]


@dataclass(frozen=True, kw_only=True)
class Span:
    """Layers [first, last), 0-based, in which only a kept set's rows pass through ``part``."""

    first: int
    last: int
    part: Part = "layer"
    kept_set: int = 0
    """Which of the plan's kept sets enters."""


def gated_span(spans: tuple[Span, ...], parts: tuple[Part, ...] = ("layer",)) -> Span | None:
    """Return the one span that an execution has; None if it has no span.

    parts: what of a layer the adapter can gate.

    ValueError for several spans, and for a span of another part.
    """
    if len(spans) == 0:
        return None
    first, *others = spans
    if others or first.part not in parts:
        raise ValueError(
            f"spans {spans}: this host carries out one span, of a part of {parts}; choose another "
            "execution"
        )
    return first


def joined_span(spans: tuple[Span, ...], parts: tuple[Part, ...] = ("layer",)) -> Span | None:
    """Return one span over the layers of all; None if there is none.

    Several spans, of whole layers, must follow each other. ValueError as ``gated_span``.
    """
    numbers = [(span.first, span.last) for span in spans]
    follow = all(last == start for (_, last), (start, _) in pairwise(numbers))
    if len(spans) < 2 or not follow or {span.part for span in spans} != {"layer"}:
        return gated_span(spans, parts)
    return replace(spans[0], last=spans[-1].last)


class Execution(Protocol):
    """A frozen dataclass with the knobs of one execution."""

    @property
    def chooses(self) -> bool:
        """Whether sparse steps choose anything, so that scores are needed."""
        ...

    def spans(self, first_layer: int, last_layer: int) -> tuple[Span, ...]:
        """Return the spans of a sparse step, for a gated range [first_layer, last_layer)."""
        ...

    def plan(self, batch: TokenBatch, ranked: Ranked, rows: RowLayout) -> ElisionPlan:
        """Return the plan of one micro-batch in a sparse step; rows: how kept tokens lie."""
        ...
