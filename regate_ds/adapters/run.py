"""What `attach` returns under every host."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from regate_ds.algorithm.plan import StepPlan
from regate_ds.config import RegateConfig


class Run(Protocol):
    """One rank's part in a training run. Every rank makes the same calls."""

    config: RegateConfig
    plan: StepPlan | None
    """The plan of the current step, or of the last one; None before the first, and if disabled."""

    def metrics(self) -> dict[str, Any]:
        """Return the step's number, whether it is dense, and its counts over all data ranks."""
        ...

    def step(self, *, applied: bool) -> None:
        """End an optimizer step; ``applied``: whether the host changed the weights."""
        ...

    def save(self, checkpoint_dir: str | Path) -> None:
        """Write the method's state into a checkpoint folder."""
        ...

    def load(self, checkpoint_dir: str | Path) -> None:
        """Load what ``save`` wrote; the number of data ranks may differ from the saved one."""
        ...

    def remove(self) -> None:
        """Leave the model to the host: what follows is the host's own."""
        ...


def metrics_of(run: Run) -> dict[str, Any]:
    """Return the counts of the step planned last, for any logger; empty with enabled=False.

    tokens_total and answer_total count all positions and all label positions of the step;
    tokens_kept counts the positions that enter gated layers (with backward_only: that have a
    gradient there), answer_kept the targets of the loss, and answer_entered the label positions
    among tokens_kept. Where each layer has a set of its own, numbers of a kind are means over them.
    image_total and image_kept count positions of images that predict no answer; they are 0 where
    the batch does not tell which positions are images. filled counts positions kept only to reach
    token_multiple, and padded slots without a token. Where a run has merged steps, merged says
    whether this is one; its tokens_kept counts patches, and answer_entered those of answers.

    RuntimeError before the first step is planned.
    """
    if not run.config.enabled:
        return {}
    if run.plan is None:
        raise RuntimeError(
            "no step is planned yet, so there are no counts; call metrics() after the first step "
            "was begun"
        )
    merged = {"merged": run.plan.is_merged} if run.config.merge.steps else {}
    return {"step": run.plan.step, "dense": run.plan.is_dense, **merged, **run.plan.counts}
