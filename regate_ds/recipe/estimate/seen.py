"""What the steps of a run took, to stand beside what is told of the same steps."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from regate_ds.recipe.config.tree import RunConfig, load_config
from regate_ds.recipe.run_folder import Row, RunFolder, leaves
from regate_ds.settings.section import plain_values

FIGURES = {
    "step_seconds": statistics.median,
    "cpu_seconds": statistics.median,
    "flops": statistics.mean,
}
"""Of a run's metrics, and how steps are averaged: now and then one waits for something else."""

MOST_ROWS = 100
"""Steps of each kind that are looked at, at even distances."""

_OF_COST = ("model.", "data.train", "data.max_length", "data.pack_length", "data.template")
_OF_COST += ("data.video_frames", "teacher.mode", "elision.", "parallel", "run.epochs")
_OF_COST += ("run.steps", "run.micro_batch", "run.accumulation", "run.balance", "run.seed")
_OF_COST += ("run.precision", "run.deepspeed")
"""Settings, or how they begin, by which a step's cost and its samples are told."""


def require_same(run: Path, config: RunConfig, num_gpus: int) -> None:
    """Refuse, by ValueError, a run whose steps are not those that are told of ``config``."""
    folder = RunFolder(run)
    if not folder.config.is_file():
        raise ValueError(f"--seen {run}: has no config.yaml; give the folder of a run")
    ran, told = (dict(leaves(plain_values(one))) for one in (load_config(folder.config), config))
    for key in dict.fromkeys([*told, *ran]):
        if key.startswith(_OF_COST) and ran.get(key) != told.get(key):
            raise ValueError(
                f"--seen {run}: ran with {key}={ran.get(key)}, but the configuration says "
                f"{told.get(key)}; give {folder.config} as the configuration"
            )
    # A run that was ended has none, and does not say it elsewhere.
    num_ranks = folder.summary()["world_size"] if folder.is_finished else num_gpus
    if num_ranks != num_gpus:
        raise ValueError(
            f"--seen {run}: ran on {num_ranks} ranks, but --gpus is {num_gpus}; give "
            f"--gpus={num_ranks}"
        )


def rows_by_kind(run: Path) -> dict[str, list[Row]]:
    """Return rows of a run folder's metrics: of "dense" and of "sparse" steps.

    ValueError if the run has steps of one kind alone, or lacks a figure.
    """
    rows = RunFolder(run).metrics()
    if lacking := [name for name in FIGURES if any(name not in row for row in rows)]:
        raise ValueError(
            f"--seen {run}: its metrics have no {lacking[0]}, so an older version made them; give "
            "the folder of a new run"
        )
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
    return {kind: found[:: -(-len(found) // MOST_ROWS)] for kind, found in kinds.items()}


def means(rows: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, float]]:
    """Return each figure of the dense and of the sparse steps."""
    return {
        figure: {kind: float(mean(row[figure] for row in rows[kind])) for kind in rows}
        for figure, mean in FIGURES.items()
    }
