"""FLOPs of a run's steps and of what goes before it, by what they are for.

Steps are counted each on all data ranks, with the padding of their rows. Image tokens, answers and
the rest share the gated layers' work by their numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from regate_ds.algorithm.executions.backward_only import BackwardOnly
from regate_ds.algorithm.executions.execution import Span
from regate_ds.algorithm.executions.random_ltd import RandomLtd
from regate_ds.cost.flops import RowCounts, products_flops, rows_flops, tower_flops
from regate_ds.cost.samples import SampleSize, rows_of_micro
from regate_ds.cost.shape import ModelShape
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.order import Order

MOST_STEPS = 20
"""Steps of the epoch that are counted, at even distances."""


def counted_steps(order: Order) -> range:
    """Return steps of the first epoch that stand for all."""
    return range(0, order.steps_per_epoch, max(1, order.steps_per_epoch // MOST_STEPS))


@dataclass(frozen=True)
class StepCost:
    """A step of one kind, mean over the counted steps."""

    flops: float
    """Of a mean data rank: decoder, head and tower."""

    busiest: float
    """FLOPs of the busiest data rank over the mean."""

    parts: dict[str, float]
    """The FLOPs of a mean data rank by what they are for."""

    largest: RowCounts
    """The micro-batch with the most positions."""


def step_cost(  # noqa: PLR0913 (a step in its parts)
    config: RunConfig,
    shape: ModelShape,
    sizes: Sequence[SampleSize],
    order: Order,
    shares: tuple[float, float] | None,
    spans: Sequence[Span],
    steps: Sequence[int],
) -> StepCost:
    flops, busiest, parts, largest = 0.0, 0.0, dict[str, float](), None
    for step in steps:
        by_rank = []
        for rank in range(order.world_size):
            one = replace(order, rank=rank, start_step=step, total_steps=step + 1)
            total = 0.0
            for numbers in one:
                samples = [sizes[n] for n in numbers]
                rows = rows_of_micro(samples, shares, config.data.pack_length)
                found = _parts(config, shape, rows, samples, spans)
                total += sum(found.values())
                for name, value in found.items():
                    parts[name] = parts.get(name, 0.0) + value / order.world_size / len(steps)
                if largest is None or rows.count * rows.length > largest.count * largest.length:
                    largest = rows
            by_rank.append(total)
        mean = sum(by_rank) / len(by_rank)
        flops += mean / len(steps)
        busiest += max(by_rank) / mean / len(steps)
    assert largest is not None
    return StepCost(flops, busiest, parts, largest)


def _parts(
    config: RunConfig,
    shape: ModelShape,
    rows: RowCounts,
    samples: Sequence[SampleSize],
    spans: Sequence[Span],
) -> dict[str, float]:
    """Return the FLOPs of a micro-batch by what they are for."""
    if isinstance(config.elision.execution, BackwardOnly | RandomLtd) and spans:
        rows = replace(rows, num_targets=sum(one.answers for one in samples))
    head = products_flops(shape.head, rows.num_targets)
    layers = rows_flops(shape, rows, spans) - head
    dense_layers = rows_flops(replace(shape, layers=_ungated(shape, spans)), rows, ()) - head
    found = {"head": head, "layers that see all": dense_layers if spans else 0.0}
    image_share = config.elision.shares_at(0.5)[1] if spans else 1.0
    images = sum(sum(one.images) for one in samples) * image_share
    gated, kept = layers - found["layers that see all"], max(1.0, rows.kept)
    answers = rows.num_targets
    found["image tokens"] = gated * min(1.0, images / kept)
    found["answers"] = gated * min(1.0, answers / kept)
    rest = gated - found["image tokens"] - found["answers"]
    found["prompts and padding"] = max(0.0, rest)
    if shape.tower is not None:
        found["tower"] = tower_flops(shape.tower, [n for one in samples for n in one.images])
    return found


def _ungated(shape: ModelShape, spans: Sequence[Span]) -> tuple[Any, ...]:
    inside = {n for span in spans for n in range(span.first, span.last)}
    return tuple(layer for n, layer in enumerate(shape.layers) if n not in inside)


def flops_before(config: RunConfig, shape: ModelShape, sizes: Sequence[SampleSize]) -> float:
    """Return the FLOPs of a teacher as large as the decoder, forward alone, and of the ranking."""
    total, forward = 0.0, 1 / 3
    if config.needs_teacher:
        for one in sizes:
            rows = rows_of_micro([one], None, None)
            total += forward * rows_flops(_all_trained(shape), rows, ())
    if config.elision.stored_ranking is not None and shape.tower is not None:
        total += forward * sum(tower_flops(shape.tower, one.images) for one in sizes)
    return total


def _all_trained(shape: ModelShape) -> ModelShape:
    """Return the shape as if all weights were trained: a forward pass is then a third."""

    def whole(products: Any) -> Any:
        return replace(products, trained=products.weights)

    layers = [replace(one, mixer=whole(one.mixer), mlp=whole(one.mlp)) for one in shape.layers]
    return replace(shape, layers=tuple(layers), head=whole(shape.head))
