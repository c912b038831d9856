"""How far the attached model is from the oracle: in the loss, and in the gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from regate_ds.algorithm.plan import ElisionPlan
from tests.families.zoo.backward_oracle import backward_oracle_loss
from tests.families.zoo.mlp_oracle import mlp_oracle_loss
from tests.families.zoo.oracle import oracle_loss

ORACLES = {
    "elide": oracle_loss,
    "mlp_only": mlp_oracle_loss,
    "backward_only": backward_oracle_loss,
    "random_ltd": oracle_loss,
}
"""By the name of an execution."""

FLOOR = 1e-3
"""A tensor's gradient is measured against its own norm and this share of the whole norm, for
tensors whose gradient is 0 in theory."""


@dataclass(frozen=True)
class Run:
    """A loss and the gradients of all parameters."""

    loss: float
    gradients: dict[str, Tensor]


def backward(model: nn.Module, loss: Tensor) -> Run:
    """Return the loss with its gradients; a parameter that it does not reach has none."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Run(float(loss.detach()), found)


def oracle_run(
    host: nn.Module,
    inputs: dict[str, Any],
    plan: ElisionPlan,
    gated: range,
    execution: str = "elide",
) -> Run:
    """Run the oracle and its backward pass."""
    return backward(host, ORACLES[execution](host, inputs, plan, gated))


def attached_run(model: nn.Module, inputs: dict[str, Any], plan: ElisionPlan) -> Run:
    """Run a model to which the adapter is attached, and its backward pass."""
    return backward(model, model(**inputs, regate_plan=plan).loss_sum)


def loss_error(found: Run, wanted: Run) -> float:
    """Return the difference relative to the loss."""
    return abs(found.loss - wanted.loss) / abs(wanted.loss)


def gradient_error(found: Run, wanted: Run) -> tuple[float, str]:
    """Return the worst relative difference of a tensor's gradient, and the tensor's name."""
    whole = sum(float(g.norm()) ** 2 for g in wanted.gradients.values()) ** 0.5
    worst = (0.0, "")
    for name in sorted(found.gradients.keys() | wanted.gradients.keys()):
        one, other = found.gradients.get(name), wanted.gradients.get(name)
        zero = (one if one is not None else other) * 0.0
        one, other = (zero if g is None else g for g in (one, other))
        scale = float(other.norm()) + FLOOR * whole
        error = float((one - other).norm()) / scale
        if not error <= worst[0]:  # also if it is not a number
            worst = (error, name)
    return worst
