"""The rows of `regate bench step`: what each computes, and by which function.

One line an arm: its configuration, whose plan it follows, and its forward pass. Other hosts run
their own passes: they have the arms of ``ours``, and "dense" is there our own dense step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regate_ds.algorithm.executions.backward_only import BackwardOnly
from regate_ds.algorithm.executions.elide import Elide
from regate_ds.algorithm.executions.execution import Execution, Span
from regate_ds.algorithm.executions.loss_only import LossOnly
from regate_ds.algorithm.executions.mlp_only import MlpOnly
from regate_ds.algorithm.executions.none import NoElision
from regate_ds.algorithm.executions.random_ltd import RandomLtd
from regate_ds.algorithm.executions.table import SUPPORTED, execution_name
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.algorithm.scores.random import Random
from regate_ds.config import RegateConfig
from regate_ds.cost.flops import plan_flops, products_flops
from regate_ds.cost.shape import ModelShape
from regate_ds.images_config import ImagesConfig
from regate_ds.recipe.bench.baselines import (
    Losses,
    every_layer_full_head,
    every_layer_labelled_head,
    full_head,
    host_loss,
    labelled_head,
    ours,
)
from regate_ds.recipe.bench.case import StepCase
from regate_ds.schedule_config import ScheduleConfig

Forward = Callable[[Any, Any, ElisionPlan], Losses]

HOST, DENSE = "host", "dense"
"""The two rows that every other is divided by."""


@dataclass(frozen=True, kw_only=True)
class StepArm:
    """One row."""

    about: str
    execution: Execution
    forward: Forward = ours
    first_layer: int = 1
    elides_images: bool = False

    @property
    def attaches(self) -> bool:
        return self.forward is ours

    @property
    def has_full_head(self) -> bool:
        return self.forward in (host_loss, full_head, every_layer_full_head)

    def config(self, case: StepCase) -> RegateConfig:
        """Return the configuration, every step of which is sparse."""
        image_share = case.image_keep_share if self.elides_images and case.image_share else 1.0
        by_layer = isinstance(self.execution, RandomLtd)
        return RegateConfig(
            execution=self.execution,
            keep_share=case.keep_share,
            images=ImagesConfig(keep_share=image_share),
            first_layer=self.first_layer,
            # It keeps the first and the last layer whole, as its paper does.
            last_layer=max(2, case.layers - 1) if by_layer else None,
            schedule=ScheduleConfig(warmup=0, final_dense_share=0.0),
            **({"score": Random()} if by_layer else {}),
        )

    def spans(self, case: StepCase) -> tuple[Span, ...]:
        """Return what the layers gate."""
        config = self.config(case)
        return config.execution.spans(config.first_layer, config.last_layer or case.layers)

    def flops(
        self, case: StepCase, shape: ModelShape, plan: ElisionPlan, *, causal: bool = False
    ) -> float:
        """Return the FLOPs of one micro-batch, as this arm runs it."""
        total = plan_flops(shape, plan, self.spans(case), causal=causal)
        if self.has_full_head:
            total -= products_flops(shape.head, plan.num_targets)
            total += products_flops(shape.head, case.samples * case.tokens)
        return total


ARMS: dict[str, StepArm] = {
    HOST: StepArm(
        about="the host's own step, its head at every position",
        execution=NoElision(),
        forward=host_loss,
    ),
    DENSE: StepArm(
        about="dense, the head on labels alone", execution=NoElision(), forward=labelled_head
    ),
    "ours_dense": StepArm(about="our own dense step (execution=none)", execution=NoElision()),
    "mask_full_head": StepArm(
        about="only the loss is masked, full head", execution=LossOnly(), forward=full_head
    ),
    "mask": StepArm(
        about="only the loss is masked, head on kept labels",
        execution=LossOnly(),
        forward=labelled_head,
    ),
    "every_layer_full_head": StepArm(
        about="gather and scatter in every layer (the paper), full head",
        execution=Elide(),
        forward=every_layer_full_head,
        first_layer=0,
    ),
    "every_layer": StepArm(
        about="gather and scatter in every layer, head on kept labels",
        execution=Elide(),
        forward=every_layer_labelled_head,
        first_layer=0,
    ),
    "elide_0": StepArm(about="ours, all layers gated", execution=Elide(), first_layer=0),
    "elide_1": StepArm(about="ours, one dense layer first", execution=Elide()),
    "images_0": StepArm(
        about="ours, and image tokens, all layers gated",
        execution=Elide(),
        first_layer=0,
        elides_images=True,
    ),
    "images_1": StepArm(
        about="ours, and image tokens, one dense layer first",
        execution=Elide(),
        elides_images=True,
    ),
    "backward_only": StepArm(about="the backward pass alone is elided", execution=BackwardOnly()),
    "random_ltd": StepArm(about="random tokens in each middle layer", execution=RandomLtd()),
    "mlp_only": StepArm(about="the MLPs alone are elided", execution=MlpOnly()),
}


def arms_of(case: StepCase) -> dict[str, StepArm]:
    """Return the rows of a case, the two baselines among them.

    ValueError names an arm that the host does not have.
    """
    allowed = {name: arm for name, arm in ARMS.items() if _fits(case, arm)}
    for name in case.arms:
        if name not in allowed:
            raise ValueError(
                f"arms={list(case.arms)}: {name!r} is not among those of host={case.host} with "
                f"layers={case.layers} and image_share={case.image_share}: {', '.join(allowed)}"
            )
    chosen = {HOST, DENSE, *(case.arms or allowed)}
    return {name: arm for name, arm in allowed.items() if name in chosen}


def _fits(case: StepCase, arm: StepArm) -> bool:
    if arm.elides_images and not case.image_share:
        return False
    if arm.first_layer >= case.layers or (isinstance(arm.execution, RandomLtd) and case.layers < 3):
        return False
    if case.host == "huggingface":
        return True
    if isinstance(arm.execution, NoElision):
        return not arm.attaches
    return arm.attaches and execution_name(arm.execution) in SUPPORTED[case.host]
