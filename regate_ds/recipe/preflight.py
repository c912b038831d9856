"""What is judged before a model is loaded, and what a run says before its first step.

A wrong setting should cost seconds, not the minutes that loading takes on many ranks.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from regate_ds.config import RegateConfig, schedule_of
from regate_ds.job.process import Process
from regate_ds.parallel.collectives import is_same_on_all
from regate_ds.recipe.config.deepspeed_json import deepspeed_config
from regate_ds.recipe.config.megatron_limits import require_packages, require_ranks, require_student
from regate_ds.recipe.config.tree import RunConfig, load_config
from regate_ds.recipe.run_folder import RunFolder, leaves
from regate_ds.recipe.students.load import make_student
from regate_ds.settings.section import plain_values
from regate_ds.teacher.loading import load_teacher_config

MAY_CHANGE = {
    "run.resume",
    "run.grace_seconds",
    "run.save_every",
    "run.eval_every",
    "run.log_every",
    "run.keep_checkpoints",
    "teacher.verify",
    "data.num_workers",
}
"""What a resumed run may set otherwise: none of it changes the training."""


def judge_run(config: RunConfig) -> None:
    """ValueError for what can be known to fail without loading anything."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if config.parallel is None:
        deepspeed_config(config, world_size)
    else:
        require_packages(config.parallel)
        require_ranks(config.parallel, world_size)
        _require_student(config)
    if config.run.plan_only:
        return
    if config.scores_online:
        require_teacher(config, world_size)
    folder, resume = RunFolder(config.run.out), config.run.resume
    if not resume:
        folder.require_new()
    elif resume != "auto" or folder.config.is_file():
        folder.require_run()
        require_same_run(config, folder.config)
    if resume == "auto" and not folder.resumes(resume):
        folder.require_unfinished()


def _require_student(config: RunConfig) -> None:
    """Ask the student's configuration, without its weights."""
    model: Any = make_student(config.model, seed=None).model
    require_student(model.config.model_type, model.config.get_text_config(), config.parallel)


def judge_teacher(config: RunConfig, world_size: int) -> None:
    """ValueError for what `regate teacher` would find only after loading."""
    if config.teacher.store is None:
        raise ValueError("teacher.store=None: name the folder that gets the reference losses")
    require_teacher(config, world_size)


def require_teacher(config: RunConfig, world_size: int) -> None:
    """Refuse what is no causal language model, and a number of ranks that cannot be cut into groups
    that hold a teacher each."""
    if config.teacher.path is not None:
        load_teacher_config(config.teacher.path)
    if world_size % config.teacher.tensor:
        raise ValueError(
            f"teacher.tensor={config.teacher.tensor}: {world_size} ranks are no multiple of it; "
            "start a multiple of it, or set it to a divisor"
        )


def require_same_run(config: RunConfig, written: Path) -> None:
    """Refuse to resume with other settings than the run was started with."""
    # The folder itself may be written otherwise, or may have been moved.
    free = MAY_CHANGE | {"run.out"}
    ours, theirs = (
        dict(leaves(plain_values(config))),
        dict(leaves(plain_values(load_config(written)))),
    )
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        mine, started = ours.get(key), theirs.get(key)
        if key not in free and mine != started:
            raise ValueError(
                f"{key}={mine!r}, but the run in {written.parent} was started with {started!r}: "
                "resume with the same value, or start a new run in another run.out"
            )


def require_one_data_set(fingerprint: str, process: Process) -> None:
    """RuntimeError if ranks have read different data, as where one of them lacks image files.

    They would take their samples from different orders. Collective.
    """
    if not is_same_on_all(fingerprint, process.group, process.device):
        raise RuntimeError(
            f"rank {process.rank} has read data with fingerprint {fingerprint[:12]}, others have "
            "read other data: give all machines the same data.train and image files"
        )


def describe_run(
    config: RunConfig, regate_config: RegateConfig, steps: int, teacher_id: str | None
) -> str:
    """How much of the run will be sparse, and by whose losses."""
    schedule = schedule_of(regate_config)
    num_sparse = sum(not schedule.is_dense(step) for step in range(steps)) * config.selects
    share = 1.0 - num_sparse * (1.0 - regate_config.keep_share) / steps
    return (
        f"{config.run.out.name}: {steps} steps, {num_sparse} of them sparse, kept share "
        f"{share:.3f} of the answer tokens, teacher {teacher_id or 'none'}"
        f"{', online' if config.scores_online else ''}"
    )
