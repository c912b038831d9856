"""FLOPs of a step, forward and backward, from a model's shape and what passes through its layers.

Matrix products alone are counted: 2 for each weight and row. The backward pass costs as much again
for the gradient of the rows, and as much for that of the weights, where they are trained.
Attention is counted as the full square of its rows, as kernels without a causal form compute it and
torch's FlopCounterMode counts it; with ``causal=True`` as the half that causal kernels compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from regate_ds.algorithm.executions.execution import Span
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.cost.shape import LayerShape, ModelShape, Products, TowerShape


@dataclass(frozen=True)
class Passing:
    """What passes through one layer: numbers of rows, and of pairs of a query and a key."""

    mixer: float
    mlp: float
    pairs: float
    back_mixer: float
    back_mlp: float
    back_pairs: float

    @classmethod
    def all_of(cls, lengths: Sequence[float], *, causal: bool) -> Passing:
        """Return the passing of whole rows of these lengths, each attending to itself."""
        rows, pairs = float(sum(lengths)), _pairs(lengths, causal)
        return cls(rows, rows, pairs, rows, rows, pairs)


def layer_flops(layer: LayerShape, passing: Passing) -> float:
    forward = 2 * (layer.mixer.weights * passing.mixer + layer.mlp.weights * passing.mlp)
    backward = 2 * (layer.mixer.weights + layer.mixer.trained) * passing.back_mixer
    backward += 2 * (layer.mlp.weights + layer.mlp.trained) * passing.back_mlp
    # A pair costs a product of queries and keys and one of weights and values, 2 each.
    pairs = passing.pairs + 2 * passing.back_pairs
    return forward + backward + 4 * layer.attention * pairs


def products_flops(products: Products, rows: float, *, needs_input_grad: bool = True) -> float:
    """Return the FLOPs of rows through matrices, forward and backward."""
    back = products.weights * needs_input_grad + products.trained
    return 2 * rows * (products.weights + back)


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """A micro-batch in numbers."""

    count: int
    """Rows, padded to one length."""

    length: float
    """Positions of a row."""

    slots: float
    """Positions of a row that enter whole gated layers."""

    kept: float
    """Kept positions of the micro-batch, padding apart."""

    num_targets: float
    """Rows of the head."""


def plan_flops(
    shape: ModelShape, plan: ElisionPlan, spans: Sequence[Span], *, causal: bool = False
) -> float:
    """Return the FLOPs of decoder and head on one micro-batch, as they run: padding counts.

    spans: those of the step's execution. The tower is counted apart (``tower_flops``).
    """
    rows = RowCounts(
        count=len(plan.kept_BK),
        length=plan.num_tokens,
        slots=plan.num_slots,
        kept=plan.num_kept,
        num_targets=plan.num_targets,
    )
    return rows_flops(shape, rows, spans if plan.moves_rows else (), causal=causal)


def rows_flops(
    shape: ModelShape, rows: RowCounts, spans: Sequence[Span], *, causal: bool = False
) -> float:
    """Return the same from numbers alone; no spans is a dense step."""
    span_of = {n: span for span in spans for n in range(span.first, span.last)}
    total = products_flops(shape.head, rows.num_targets)
    for number, layer in enumerate(shape.layers):
        total += layer_flops(layer, _passing(rows, span_of.get(number), causal))
    return total


def tower_flops(tower: TowerShape, image_tokens: Sequence[int], extra: int = 0) -> float:
    """Return the FLOPs of tower and projector on images of so many tokens.

    extra: positions of an image in the tower that become no token.
    """
    patches = [tokens * tower.patches_per_token + extra for tokens in image_tokens]
    passing = Passing.all_of(patches, causal=False)
    is_trained = any(layer.mixer.trained for layer in tower.layers)
    if not is_trained:
        passing = replace(passing, back_mixer=0.0, back_mlp=0.0, back_pairs=0.0)
    layers = sum(layer_flops(layer, passing) for layer in tower.layers)
    embedded = products_flops(tower.patch, sum(patches), needs_input_grad=False)
    tokens = float(sum(image_tokens))
    behind = products_flops(tower.projector, tokens, needs_input_grad=is_trained)
    return layers + embedded + behind


def _passing(rows: RowCounts, span: Span | None, causal: bool) -> Passing:
    full = Passing.all_of([rows.length] * rows.count, causal=causal)
    if span is None:
        return full
    if span.part == "mlp":
        return replace(full, mlp=rows.kept, back_mlp=rows.kept)
    if span.part == "backward":
        # Causal: a kept query sees about half of the positions.
        slots = float(rows.count * rows.slots)
        pairs = slots * rows.length * (0.5 if causal else 1.0)
        mixer, mlp = full.mixer + slots, full.mlp - rows.kept + slots
        return Passing(mixer, mlp, full.pairs + pairs, slots, slots, pairs)
    return Passing.all_of([rows.slots] * rows.count, causal=causal)


def _pairs(lengths: Sequence[float], causal: bool) -> float:
    return sum(n * (n + 1) / 2 if causal else n * n for n in lengths)
