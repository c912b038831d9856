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


def plan_flops(
    shape: ModelShape, plan: ElisionPlan, spans: Sequence[Span], *, causal: bool = False
) -> float:
    """Return the FLOPs of decoder and head on one micro-batch, as they run: padding counts.

    spans: those of the step's execution. The tower is counted apart (``tower_flops``).
    """
    number_of = {n: span for span in spans for n in range(span.first, span.last)}
    total = products_flops(shape.head, plan.num_targets)
    for number, layer in enumerate(shape.layers):
        span = number_of.get(number) if plan.moves_rows else None
        total += layer_flops(layer, _passing(plan, span, causal))
    return total


def dense_flops(
    shape: ModelShape, lengths: Sequence[float], num_targets: float, *, causal: bool = False
) -> float:
    """Return the FLOPs of decoder and head on whole samples of these lengths."""
    passing = Passing.all_of(lengths, causal=causal)
    layers = sum(layer_flops(layer, passing) for layer in shape.layers)
    return layers + products_flops(shape.head, num_targets)


def elided_flops(  # noqa: PLR0913 (a step in its numbers)
    shape: ModelShape,
    lengths: Sequence[float],
    kept: Sequence[float],
    num_targets: float,
    gated: range,
    *,
    causal: bool = False,
) -> float:
    """Return the FLOPs of a step of ``elide``: the layers in ``gated`` see ``kept`` rows only."""
    full, part = (Passing.all_of(each, causal=causal) for each in (lengths, kept))
    layers = sum(
        layer_flops(layer, part if number in gated else full)
        for number, layer in enumerate(shape.layers)
    )
    return layers + products_flops(shape.head, num_targets)


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


def _passing(plan: ElisionPlan, span: Span | None, causal: bool) -> Passing:
    num_rows, length = len(plan.kept_BK), plan.num_tokens
    full_lengths = plan.token_run_lengths if plan.is_packed and causal else [length] * num_rows
    full = Passing.all_of(full_lengths, causal=causal)
    if span is None:
        return full
    own = plan.sets[span.kept_set] if plan.sets else plan
    kept = float(own.num_kept)
    if span.part == "mlp":
        return replace(full, mlp=kept, back_mlp=kept)
    slots = own.num_slots
    if span.part == "backward":
        # Causal: a kept query sees about half of the positions.
        pairs = num_rows * slots * length * (0.5 if causal else 1.0)
        rows = float(num_rows * slots)
        others = full.mlp - kept
        mixer, squares = full.mixer + rows, full.pairs + pairs
        return Passing(mixer, others + rows, squares, rows, rows, pairs)
    lengths = own.run_lengths if own.is_packed and causal else [slots] * num_rows
    return Passing.all_of(lengths, causal=causal)


def _pairs(lengths: Sequence[float], causal: bool) -> float:
    return sum(n * (n + 1) / 2 if causal else n * n for n in lengths)
