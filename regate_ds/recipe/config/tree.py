"""The configuration of a run: a frozen tree, read from YAML and judged before anything is loaded.

    model: {path: models/student}
    data: {train: scenes/train.json, test: scenes/test.json}
    run: {out: runs/first, steps: 400}

docs/configuration.md lists every key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from regate_ds.config import RegateConfig
from regate_ds.recipe.config.length import judge_length
from regate_ds.recipe.config.megatron_limits import require_settings
from regate_ds.recipe.config.sections import (
    DataConfig,
    ParallelConfig,
    RankConfig,
    RunSection,
)
from regate_ds.recipe.optimizer import OptimizerConfig
from regate_ds.recipe.students.config import ModelConfig
from regate_ds.settings.section import plain_values, read_section
from regate_ds.settings.yaml import read_yaml
from regate_ds.teacher.config import TeacherConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run; two runs with equal trees on equal data are the same run."""

    model: ModelConfig
    data: DataConfig
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    rank: RankConfig = field(default_factory=RankConfig)
    elision: RegateConfig = field(default_factory=RegateConfig)
    parallel: ParallelConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunSection

    def __post_init__(self) -> None:
        if self.run.steps is not None:
            judge_length(self.elision, self.run.steps)
        if self.parallel is not None:
            require_settings(self)
        if self.run.plan_only and not self.elision.enabled:
            raise ValueError(
                "run.plan_only=True: with elision.enabled=false nothing is planned; set "
                "elision.enabled=true"
            )
        if self.needs_teacher and self.teacher.mode == "store" and self.teacher.store is None:
            raise ValueError(
                "teacher.store=None: elision ranks tokens by the teacher's losses; name the folder "
                "that `regate teacher` writes, set teacher.mode=online, or elision.execution=none"
            )
        if self.needs_teacher and self.teacher.column != self.elision.column:
            raise ValueError(
                f"teacher.column={self.teacher.column}: elision.score reads the column "
                f"{self.elision.column}; set teacher.column={self.elision.column}, with a "
                "teacher.store of its own, or choose another score"
            )
        if self.elision.stored_ranking is not None and self.rank.store is None:
            raise ValueError(
                "rank.store=None: elision.images.ranking reads orders that are computed once; name "
                "the folder that `regate rank` writes, or use random or stride"
            )
        if self.run.eval_every and self.data.test is None:
            raise ValueError(
                f"run.eval_every={self.run.eval_every}: there is nothing to evaluate on; "
                "set data.test, or run.eval_every=0"
            )

    @property
    def layout(self) -> str:
        """How the ranks hold the model, in words; empty if all of them hold it alike."""
        return "" if self.parallel is None else self.parallel.layout

    @property
    def scores_online(self) -> bool:
        """True if the teacher runs inside the training job."""
        return self.needs_teacher and self.teacher.mode == "online"

    @property
    def needs_teacher(self) -> bool:
        """True if some step ranks tokens by the teacher's losses."""
        return self.elision.needs_reference


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply overrides (``section.key=value``, values in YAML), judge the result.

    ValueError is one line with the file, the key, its value and what is allowed.
    """
    tree = read_tree(path, overrides)
    try:
        return read_section(RunConfig, tree, where="")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_tree(path: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Read a YAML file of sections, if one is given, and apply overrides.

    ValueError for what is no such file, and for an override that is none.
    """
    tree = {} if path is None else _read_yaml(path)
    for override in overrides:
        _apply_override(tree, override)
    return tree


def dump_config(config: RunConfig) -> str:
    """Return the whole tree as YAML, with defaults; ``load_config`` reads back an equal one."""
    return yaml.safe_dump(plain_values(config), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"the configuration {path} cannot be read ({error.strerror}); give a YAML file"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not YAML: {error}; correct the file") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}; it must hold sections with keys")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not all(name.split(".")):
        raise ValueError(f"override {override!r} is not of the form section.key=value")
    try:
        value = read_yaml(text)
    except ValueError:
        raise ValueError(
            f"override {override!r}: {text!r} is not a YAML value; put text in quotes"
        ) from None
    *parents, key = name.split(".")
    node = tree
    for depth, parent in enumerate(parents, start=1):
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ValueError(
                f"override {override!r}: {'.'.join(parents[:depth])} has no keys; set it as a whole"
            )
    node[key] = value
