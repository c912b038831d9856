"""Whether a run's steps suit what is elided in them."""

from __future__ import annotations

from regate_ds.config import RegateConfig


def judge_length(elision: RegateConfig, num_steps: int) -> None:
    """Refuse, by ValueError, a schedule shorter than the run, or one without a sparse step."""
    if not elision.enabled:
        return
    if elision.merge.steps:
        raise ValueError(
            f"elision.merge.steps={elision.merge.steps}: the figures of `regate train` do not know "
            "merged steps; set it to 0, or merge in a loop of your own (docs/merge.md)"
        )
    for name, one in (("", elision.schedule), ("images.", elision.images.schedule)):
        if one is not None and one.in_steps(num_steps).total_steps < num_steps:
            raise ValueError(
                f"elision.{name}schedule.total_steps={one.total_steps}: the run has {num_steps} "
                "steps; set it to at least as many, or to null"
            )
    for name, given in elision.never_sparse(num_steps).items():
        raise ValueError(
            f"elision.keep_share={elision.keep_share} and elision.images.keep_share="
            f"{elision.images.keep_share}, but by elision.{name} no step of the run's {num_steps} "
            f"is sparse: lower its warmup={given.warmup}, final_dense_share="
            f"{given.final_dense_share} or cycle_dense_steps={given.cycle_dense_steps}, or set "
            "elision.execution=none"
        )
