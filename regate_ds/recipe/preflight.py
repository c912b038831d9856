"""Refuse wrong settings before a model is loaded, and describe a run before its first step.

A wrong setting should cost seconds, not the minutes that loading takes on many ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from regate_ds.algorithm.executions.random_ltd import RandomLtd
from regate_ds.algorithm.rankings.ranking import StoredRanking
from regate_ds.job.process import Process
from regate_ds.parallel.collectives import is_same_on_all
from regate_ds.ranking.api import require_stored
from regate_ds.recipe.config.deepspeed_json import deepspeed_config
from regate_ds.recipe.config.megatron_limits import require_packages, require_ranks, require_student
from regate_ds.recipe.config.tree import RunConfig, load_config
from regate_ds.recipe.corpus import corpus_student
from regate_ds.recipe.run_folder import RunFolder, leaves
from regate_ds.settings.section import plain_values
from regate_ds.teacher.loading import load_teacher_config

MAY_CHANGE = {
    # Their product with the number of data ranks stays: see saving/contents.py.
    "run.micro_batch",
    "run.accumulation",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.context",
    "parallel.virtual",
    "parallel.sequence",
    "parallel.recompute",
    "run.resume",
    "run.grace_seconds",
    "run.hang_seconds",
    "run.save_every",
    "run.eval_every",
    "run.log_every",
    "run.keep_checkpoints",
    "teacher.verify",
    "rank.verify",
    "data.num_workers",
    "data.cache",
}
"""Settings that a resumed run may change, because they do not change the training."""


def judge_run(config: RunConfig) -> None:
    """Refuse, by ValueError, a run that is known to fail before anything is loaded."""
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
    judge_folder(config)


def judge_folder(config: Any, load: Callable[[Path], Any] = load_config) -> None:
    """Refuse, by ValueError, a run folder that holds another run, or none to go on with.

    load: reads a file of such a configuration, which has a ``run.out`` and a ``run.resume``.
    """
    folder, resume = RunFolder(config.run.out), config.run.resume
    if not resume:
        folder.require_new()
    elif resume != "auto" or folder.config.is_file():
        folder.require_run()
        require_same_run(config, folder.config, load)
    if resume == "auto" and not folder.resumes(resume):
        folder.require_unfinished()


def _require_student(config: RunConfig) -> None:
    """Refuse a student that cannot be cut as `parallel` says, by its shapes without weights."""
    model: Any = corpus_student(config, weights=False).model
    require_student(model.config.model_type, model.config.get_text_config(), config.parallel)


def judge_teacher(config: RunConfig, world_size: int) -> None:
    """Refuse, by ValueError, settings that `regate teacher` would find wrong only after loading."""
    if config.teacher.store is None:
        raise ValueError("teacher.store=None: name the folder that gets the reference losses")
    require_teacher(config, world_size)


def judge_rank(config: RunConfig) -> StoredRanking:
    """Return the ranking whose orders are to be computed. ValueError if the configuration reads
    none, or names no folder for them."""
    ranking = require_stored(config.elision.images.ranking)
    if config.rank.store is None:
        raise ValueError("rank.store=None: name the folder that gets the orders of image tokens")
    return ranking


def require_teacher(config: RunConfig, world_size: int) -> None:
    """Refuse a teacher that is no causal language model, or ranks that form no whole teachers."""
    if config.teacher.path is not None:
        load_teacher_config(config.teacher.path)
    if world_size % config.teacher.tensor:
        raise ValueError(
            f"teacher.tensor={config.teacher.tensor}: the job has {world_size} ranks, which is no "
            f"multiple of it; start a multiple of it, or set it to a divisor of {world_size}"
        )


def require_same_run(config: Any, written: Path, load: Callable[[Path], Any] = load_config) -> None:
    """Refuse to resume a run with settings other than those it was started with."""
    # The path of the folder may be spelled differently, or the folder may have been moved.
    may_change = MAY_CHANGE | {"run.out"}
    new, old = (
        dict(leaves(plain_values(config))),
        dict(leaves(plain_values(load(written)))),
    )
    for key in [*new, *(key for key in old if key not in new)]:
        if key not in may_change and new.get(key) != old.get(key):
            raise ValueError(
                f"{key}={new.get(key)!r}, but the run in {written.parent} was started with "
                f"{old.get(key)!r}; resume with the same value, or start a new run in another "
                "run.out"
            )


def require_one_data_set(fingerprint: str, process: Process) -> None:
    """Refuse, by RuntimeError, ranks that have read different data. Collective.

    This happens where a node lacks image files. The ranks would take samples in different orders.
    """
    if not is_same_on_all(fingerprint, process.group, process.device):
        raise RuntimeError(
            f"rank {process.rank} has read data with fingerprint {fingerprint[:12]}, but other "
            "ranks have read other data; give all nodes the same data.train and image files"
        )


def describe_run(config: RunConfig, steps: int, origin: Mapping[str, str | None]) -> str:
    """Return a line that says how much of the run is sparse, and by whose losses and orders.

    origin: as ``origin_of`` returns it.
    """
    elision = config.elision
    schedules = elision.schedules(steps)
    courses = {"answer": schedules.answers, "image": schedules.images}
    if isinstance(elision.execution, RandomLtd):  # its share is of tokens of all kinds
        courses = {"samples'": schedules.answers}
    kept = " and ".join(
        f"{1.0 if one is None else one.expected_share(steps):.3f} of the {kind} tokens"
        for kind, one in courses.items()
    )
    orders = ""
    if "orders_ranking" in origin:
        by = origin["orders_model_id"] or "no model"
        orders = f", image orders {origin['orders_ranking']} by {by}"
    return (
        f"{config.run.out.name}: {steps} steps, {schedules.num_sparse(steps)} of them sparse, kept "
        f"share {kept}, teacher {origin.get('teacher_id') or 'none'}"
        f"{', online' if config.scores_online else ''}{orders}"
    )
