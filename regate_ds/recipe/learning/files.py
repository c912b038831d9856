"""The benchmark's plan as data: an arm, a task and a round are a YAML file each.

configs/learning/arms/NAME.yaml     how a run differs from the task's own configuration
configs/learning/tasks/NAME.yaml    data, student, and the configuration of its runs
configs/learning/rounds/NAME.yaml   which arms are run on which tasks, with which seeds
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from regate_ds.recipe.tasks.table import TASKS
from regate_ds.recipe.tasks.task import StudentFields
from regate_ds.settings.refuse import require
from regate_ds.settings.section import read_section
from regate_ds.settings.yaml import read_yaml

Kind = TypeVar("Kind")

Tree = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train; all arms of a seed share student, order of samples and random choices."""

    about: str
    """One line: what it is, and why it is there."""

    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    """Sections of a run's configuration, laid over those of the task."""


@dataclass(frozen=True, kw_only=True)
class LearningTask:
    """Data and students of one kind: what a stranger writes to add a task of their own."""

    about: str
    """One line: its images and its questions."""

    builder: str
    """Name in the table of tasks, which makes the data and the students."""

    config: Path
    """YAML file with the configuration of the task's runs; paths in it are filled in."""

    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    """Sections laid over that configuration, for all arms."""

    steps: int
    """Optimizer steps of a whole run."""

    num_train: int
    num_dev: int
    num_test: int
    """Samples of each part."""

    dev_seed: int = 0
    """Seed of the scenes of train and dev."""

    test_seed: int
    """Seed of the scenes of the test part, which is used for nothing else."""

    frames: int | None = None
    """Frames of a clip; null makes pictures."""

    student: StudentFields = StudentFields()
    """How the student differs from the task's own."""

    def __post_init__(self) -> None:
        require(self, "builder", self.builder in TASKS, f"must be one of {', '.join(TASKS)}")
        for key in ("steps", "num_train", "num_dev", "num_test"):
            require(self, key, getattr(self, key) >= 1, "must be at least 1")
        others = f"must differ from dev_seed={self.dev_seed}: the test part is seen once"
        require(self, "test_seed", self.test_seed != self.dev_seed, others)


@dataclass(frozen=True, kw_only=True)
class Round:
    """What is run, and on which part it is judged."""

    about: str
    part: Literal["dev", "test"]
    """Choices are made on dev; test is for the settings that were chosen, once."""

    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    """A seed has a student, an order of samples and random choices of its own."""

    dense: str = "dense"
    random: str = "random"
    """Arms that the others are compared with, in rounds that have them."""

    steps: int | None = None
    """Optimizer steps of a whole run in this round; null is the task's own."""

    fractions: dict[str, Any] = field(default_factory=dict[str, Any])
    """By arm: shares of the steps at which it is trained to its end, each with its own whole
    schedule; an arm without a line is trained at 1."""

    def __post_init__(self) -> None:
        for key in ("tasks", "arms", "seeds"):
            given = getattr(self, key)
            require(self, key, len(given) > 0, "must not be empty")
            require(self, key, len(set(given)) == len(given), "must not hold one twice")
        for key, usual in (("dense", "dense"), ("random", "random")):
            arm = getattr(self, key)
            require(self, key, arm in (usual, *self.arms), "must be one of the arms")
        require(self, "steps", self.steps is None or self.steps >= 1, "must be at least 1, or null")
        for arm, shares in self.fractions.items():
            where = f"fractions.{arm}={shares!r}"
            if arm not in self.arms:
                raise ValueError(f"{where}: {arm} is none of the arms {', '.join(self.arms)}")
            if not isinstance(shares, list) or not all(_is_share(share) for share in shares):
                raise ValueError(f"{where}: must be a list of shares above 0, at most 2")

    def shares(self, arm: str) -> tuple[float, ...]:
        return tuple(float(share) for share in self.fractions.get(arm, [1.0]))


@dataclass(frozen=True, kw_only=True)
class RunKey:
    """One training run of the benchmark."""

    task: str
    part: str
    arm: str
    seed: int
    steps: int
    fraction: float

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}-steps{self.num_steps}"

    @property
    def num_steps(self) -> int:
        return max(1, round(self.steps * self.fraction))


def keys_of(plan: Round, tasks: Mapping[str, LearningTask]) -> Iterator[RunKey]:
    """Yield the round's runs: all arms of a seed before the next seed.

    ValueError if two lengths of an arm are as many steps.
    """
    for task in plan.tasks:
        steps = tasks[task].steps if plan.steps is None else plan.steps
        _require_lengths(plan, task, steps)
        for seed in plan.seeds:
            for arm in plan.arms:
                for fraction in plan.shares(arm):
                    yield RunKey(
                        task=task,
                        part=plan.part,
                        arm=arm,
                        seed=seed,
                        steps=steps,
                        fraction=fraction,
                    )


def _require_lengths(plan: Round, task: str, steps: int) -> None:
    for arm in plan.arms:
        lengths = [max(1, round(steps * share)) for share in plan.shares(arm)]
        if len(set(lengths)) < len(lengths):
            raise ValueError(
                f"fractions.{arm}={plan.fractions[arm]}: of the {steps} steps of {task} these are "
                f"{lengths}, of which two are the same run; leave one out"
            )


def read_file(kind: type[Kind], folder: Path, name: str) -> Kind:
    """Read one of the benchmark's files. ValueError in one line names the file and the key."""
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in folder.glob("*.yaml")))
        raise ValueError(f"{path} does not exist; {folder} has {known or 'no file'}")
    try:
        return read_section(kind, read_yaml(path.read_text(encoding="utf-8")), where="")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def settings_of(task: LearningTask, arm: Arm) -> Tree:
    """Return the configuration that the task's file, its settings and the arm's make together."""
    base = read_yaml(task.config.read_text(encoding="utf-8")) or {}
    return laid_over(laid_over(base, task.settings), arm.settings)


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> Tree:
    """Return ``below`` with the keys of ``above``, section by section."""
    both = dict(below)
    for key, value in above.items():
        old = both.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = laid_over(old, value)
        both[key] = value
    return both


def settings_digest(task: LearningTask, arm: Arm, key: RunKey) -> str:
    """Return a name of everything that decides a run: another one makes an old result stale."""
    own = {name: value for name, value in asdict(task).items() if name not in _NO_PART_OF_A_RUN}
    basis = [settings_of(task, arm), own, key.seed, key.num_steps, key.part]
    return short_digest(basis)


def short_digest(basis: Any) -> str:
    """Return a short name of plain values."""
    text = json.dumps(basis, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


_NO_PART_OF_A_RUN = {"about", "steps", "config", "settings"}


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 2
