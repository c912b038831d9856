"""What the steps of a run took, to stand beside what was told of them."""

from __future__ import annotations

import statistics
from pathlib import Path

from regate_ds.recipe.run_folder import RunFolder

FIGURES = {
    "step_seconds": statistics.median,
    "cpu_seconds": statistics.median,
    "flops": statistics.mean,
}
"""Of a run's metrics, and how steps are averaged: now and then one waits for something else."""


def seen_steps(run: Path) -> dict[str, dict[str, float]]:
    """Return each figure of a run folder's dense steps and of its sparse ones.

    ValueError if the run has steps of one kind alone.
    """
    rows = RunFolder(run).metrics()
    kinds = {
        "dense": [row for row in rows if row["dense"]],
        "sparse": [row for row in rows if not row["dense"]],
    }
    for kind, found in kinds.items():
        if not found:
            raise ValueError(
                f"--seen {run}: of its {len(rows)} steps none is {kind}; give the folder of a run "
                "that has both, such as one with elision.schedule.cycle_steps=2 and "
                "cycle_dense_steps=1"
            )
    return {
        figure: {kind: float(mean(row[figure] for row in kinds[kind])) for kind in kinds}
        for figure, mean in FIGURES.items()
    }
