"""Where a round's files lie, and what a run of it is told: paths, seed and length.

Data and stores lie under names of what made them, so that other settings never find old ones.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from regate_ds.recipe.config.tree import RunConfig, load_config
from regate_ds.recipe.learning.files import (
    Arm,
    LearningTask,
    RunKey,
    Tree,
    laid_over,
    settings_of,
    short_digest,
)
from regate_ds.recipe.tasks.table import TASKS
from regate_ds.stores.atomic_file import make_folder


@dataclass(frozen=True, kw_only=True)
class TaskFolder:
    """A task's folder: its data, and for each seed a student and what is computed once."""

    folder: Path
    task: LearningTask

    def data(self, part: str) -> Path:
        return self._data_folder(part) / "test.json"

    def _data_folder(self, part: str) -> Path:
        made_of = [self.task.builder, self.task.frames, *self._sizes(part)]
        return self.folder / f"data-{part}-{short_digest(made_of)}"

    def _sizes(self, part: str) -> tuple[int, int, int]:
        """Return how many samples a builder writes to train and to test, and its seed."""
        task = self.task
        if part == "dev":
            return task.num_train, task.num_dev, task.dev_seed
        # A builder writes two parts; of this seed the held-out one alone is read.
        return 1, task.num_test, task.test_seed

    @property
    def train(self) -> Path:
        return self._data_folder("dev") / "train.json"

    def seed(self, seed: int) -> Path:
        return self.folder / f"seed{seed}"

    def build_data(self, part: str) -> None:
        """Build the training part and dev, and for a round on test that part, unless they exist."""
        task = self.task
        for name in dict.fromkeys(("dev", part)):
            num_train, num_held_out, seed = self._sizes(name)
            if not self.data(name).is_file():
                out = self.data(name).parent
                given = ["--train", num_train, "--test", num_held_out, "--seed", seed]
                given += [] if task.frames is None else ["--frames", task.frames]
                builder, parser = TASKS[task.builder], ArgumentParser()
                builder.add_arguments(parser)
                builder.build_data(parser.parse_args([str(out), *map(str, given)]))

    def make_student(self, seed: int) -> Path:
        make = TASKS[self.task.builder].make_student
        return make(self.train, self.folder / "cache", seed, self.task.student)

    def tree(self, arm: Arm, key: RunKey, student: Path) -> Tree:
        """Return the whole configuration of a run, with its paths and seeds filled in."""
        filled: dict[str, Any] = {
            "model": {"path": str(student)},
            "data": {"train": str(self.train), "test": str(self.data(key.part)), "num_workers": 0},
            "elision": {"random": {"seed": key.seed}, "images": {"random": {"seed": key.seed}}},
            "run": {
                "out": str(self.folder / "runs" / f"{key.part}-{key.name}"),
                "steps": key.num_steps,
                "seed": key.seed,
            },
        }
        tree = laid_over(settings_of(self.task, arm), filled)
        own, images = self.seed(key.seed), tree["elision"]["images"]
        made_of = [tree["model"], _without("test", tree["data"])]
        teacher = _without("store", tree.get("teacher", {}))
        column = teacher.get("column", "text")
        store = own / f"reference-{column}-{short_digest([made_of, teacher])}"
        tree["teacher"] = {**teacher, "store": str(store)}
        if (ranking := images.get("ranking")) is not None:
            rank = _without("store", tree.get("rank", {}))
            store = own / f"orders-{ranking}-{short_digest([made_of, images.get(ranking), rank])}"
            tree["rank"] = {**rank, "store": str(store)}
        return tree

    def write(self, tree: Tree, name: str) -> Path:
        """Write a configuration and return its file. ValueError as the run itself would say it."""
        path = self.folder / "configs" / f"{name}.yaml"
        make_folder(path.parent)
        path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        load_config(path)
        return path


def _without(name: str, section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != name}


def once_costs(config: RunConfig) -> dict[str, float]:
    """Return the CPU seconds of what was computed once for a run, by the name of its job."""
    found: dict[str, float] = {}
    for job, folder in stores_of(config).items():
        found[job] = json.loads(cost_file(folder).read_text())["cpu_seconds"]
    return found


def stores_of(config: RunConfig) -> dict[str, Path]:
    """Return the stores that a run reads, by the job that makes them."""
    stores: dict[str, Path] = {}
    if config.needs_teacher:
        assert config.teacher.store is not None
        stores["teacher"] = config.teacher.store
    if config.elision.stored_ranking is not None:
        assert config.rank.store is not None
        stores["rank"] = config.rank.store
    return stores


def cost_file(store: Path) -> Path:
    return store.with_name(f"{store.name}.cost.json")
