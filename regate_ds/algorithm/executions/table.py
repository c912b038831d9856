"""All executions by name, and which host supports which; the others refuse it by name."""

from __future__ import annotations

from regate_ds.algorithm.executions.after_forward import AfterForward
from regate_ds.algorithm.executions.backward_only import BackwardOnly
from regate_ds.algorithm.executions.elide import Elide
from regate_ds.algorithm.executions.elide_images import ElideImages
from regate_ds.algorithm.executions.execution import Execution
from regate_ds.algorithm.executions.loss_only import LossOnly
from regate_ds.algorithm.executions.mlp_only import MlpOnly
from regate_ds.algorithm.executions.none import NoElision
from regate_ds.algorithm.executions.random_ltd import RandomLtd
from regate_ds.algorithm.executions.weighted import Weighted

EXECUTIONS: dict[str, type[Execution]] = {
    "elide": Elide,
    "elide_images": ElideImages,
    "loss_only": LossOnly,
    "none": NoElision,
    "mlp_only": MlpOnly,
    "backward_only": BackwardOnly,
    "random_ltd": RandomLtd,
    "weighted": Weighted,
    "after_forward": AfterForward,
}

SUPPORTED: dict[str, tuple[str, ...]] = {
    "huggingface": tuple(EXECUTIONS),
    "deepspeed_pipeline": ("elide", "elide_images", "loss_only", "none", "weighted"),
    "megatron": ("elide", "elide_images", "loss_only", "none", "weighted"),
}
"""By host: what its adapter carries out, tested against an oracle by hand."""


def execution_name(execution: Execution) -> str:
    """Return the name that a configuration gives an execution."""
    return next(name for name, kind in EXECUTIONS.items() if type(execution) is kind)


def require_execution(execution: Execution, host: str) -> None:
    """Refuse, by ValueError, an execution that a host's adapter does not carry out."""
    if host not in SUPPORTED:
        raise ValueError(f"host={host!r} has no line in SUPPORTED, which has {list(SUPPORTED)}")
    name = execution_name(execution)
    if name not in SUPPORTED[host]:
        raise ValueError(
            f"execution={name} is not supported under {host}; choose one of {SUPPORTED[host]}"
        )
