"""The benchmark's files: what they may say, and what makes a result stale."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.learning.files import (
    Arm,
    LearningTask,
    Round,
    RunKey,
    keys_of,
    laid_over,
    read_file,
    settings_digest,
)
from regate_ds.recipe.learning.task_folder import TaskFolder, stores_of
from tests.support.paths import ROOT

FILES = ROOT / "configs" / "learning"

ROUND = "about: x\npart: dev\ntasks: [digits]\narms: [dense, random]\nseeds: [0, 1]\n"


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("arm: x", "unknown key; did you mean arms?"),
        ("fractions: {other: [0.5]}", "other is none of the arms dense, random"),
        ("dense: other", "dense='other': must be one of the arms"),
        ("random: other", "random='other': must be one of the arms"),
        ("fractions: {dense: 0.5}", "must be a list of shares"),
        ("fractions: {dense: [0]}", "must be a list of shares"),
        ("fractions: {dense: [true]}", "must be a list of shares"),
    ],
)
def test_a_wrong_round_is_refused_by_its_file_and_key(tmp_path: Path, more: str, problem: str):
    (tmp_path / "mine.yaml").write_text(ROUND + more)
    with pytest.raises(ValueError, match=rf"mine\.yaml.*{problem}"):
        read_file(Round, tmp_path, "mine")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("part: train", "must be one of dev, test"),
        ("arms: []", "must not be empty"),
        ("seeds: [0]\nsteps: 0", "steps=0: must be at least 1, or null"),
        ("seeds: [1, 1]", "must not hold one twice"),
    ],
)
def test_a_wrong_line_is_refused(tmp_path: Path, line: str, problem: str):
    key = line.partition(":")[0]
    lines = [line if old.startswith(f"{key}:") else old for old in ROUND.splitlines()]
    (tmp_path / "mine.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=problem):
        read_file(Round, tmp_path, "mine")


def test_two_lengths_of_one_run_are_refused(tmp_path: Path):
    task = read_file(LearningTask, FILES / "tasks", "digits")
    (tmp_path / "mine.yaml").write_text(f"{ROUND}steps: 10\nfractions: {{dense: [0.5, 0.52]}}")
    plan = read_file(Round, tmp_path, "mine")
    with pytest.raises(ValueError, match=r"fractions\.dense=.* two are the same run"):
        list(keys_of(plan, {"digits": task}))


def test_a_file_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ValueError, match=r"fast\.yaml does not exist; .* has .*quick"):
        read_file(Round, FILES / "rounds", "fast")


def test_a_test_part_is_never_of_the_scenes_that_choices_were_made_on():
    task = read_file(LearningTask, FILES / "tasks", "digits")
    with pytest.raises(ValueError, match="test_seed=0: must differ from dev_seed=0"):
        replace(task, test_seed=0)
    with pytest.raises(ValueError, match="builder='letters': must be one of"):
        replace(task, builder="letters")


def test_settings_are_laid_over_key_by_key():
    below = {"a": {"x": 1, "y": 2}, "b": 3, "c": {"z": 4}}
    above = {"a": {"y": 5}, "b": {"w": 6}, "c": 7}
    assert laid_over(below, above) == {"a": {"x": 1, "y": 5}, "b": {"w": 6}, "c": 7}
    assert below == {"a": {"x": 1, "y": 2}, "b": 3, "c": {"z": 4}}


def _key(name: str, task: LearningTask) -> RunKey:
    return RunKey(task=name, part="dev", arm="x", seed=0, steps=task.steps, fraction=1.0)


@pytest.mark.parametrize("path", sorted((FILES / "tasks").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_task_can_be_read(path: Path):
    task = read_file(LearningTask, FILES / "tasks", path.stem)
    settings_digest(task, Arm(about="x"), _key(path.stem, task))


@pytest.mark.parametrize("path", sorted((FILES / "rounds").glob("*.yaml")), ids=lambda p: p.stem)
def test_each_round_is_made_of_runs_that_can_start(path: Path, tmp_path: Path):
    """Every arm of every round makes a configuration that `regate train` would take."""
    plan = read_file(Round, FILES / "rounds", path.stem)
    tasks = {name: read_file(LearningTask, FILES / "tasks", name) for name in plan.tasks}
    keys = list(keys_of(plan, tasks))
    assert len(keys) == len(plan.tasks) * len(plan.seeds) * sum(
        len(plan.shares(arm)) for arm in plan.arms
    )
    assert len({(key.task, key.name) for key in keys}) == len(keys)
    for key in keys:
        arm = read_file(Arm, FILES / "arms", key.arm)
        folder = TaskFolder(folder=tmp_path, task=tasks[key.task])
        tree = folder.tree(arm, key, Path("student"))
        config = load_config(folder.write(tree, key.name))
        assert config.run.seed == key.seed
        assert config.run.steps == key.num_steps


def test_arms_of_a_seed_share_the_store_of_their_column_alone(tmp_path: Path):
    task = read_file(LearningTask, FILES / "tasks", "digits")
    folder = TaskFolder(folder=tmp_path, task=task)
    key = RunKey(task="digits", part="dev", arm="x", seed=3, steps=100, fraction=1.0)
    stores: dict[str, list[str]] = {}
    for name in ("base", "excess_loss", "gain", "cal", "rho1"):
        tree = folder.tree(read_file(Arm, FILES / "arms", name), key, Path("student"))
        config = load_config(folder.write(tree, name))
        made = stores_of(config)["teacher"]
        assert made.parent == tmp_path / "seed3"
        stores.setdefault(made.name, []).append(name)
    shared = {name.rpartition("-")[0]: arms for name, arms in stores.items()}
    assert shared == {
        "reference-text": ["base", "excess_loss"],
        "reference-gain": ["gain", "cal"],
        "reference-student": ["rho1"],
    }
    assert len(stores) == len(shared)


def test_arms_that_no_round_runs_are_not_kept():
    rounds = [read_file(Round, FILES / "rounds", p.stem) for p in (FILES / "rounds").glob("*.yaml")]
    run = {arm for plan in rounds for arm in plan.arms}
    assert run == {path.stem for path in (FILES / "arms").glob("*.yaml")}


def test_another_setting_gives_another_digest():
    task = read_file(LearningTask, FILES / "tasks", "digits")
    arm = Arm(about="x", settings={"elision": {"keep_share": 0.5}})
    key = RunKey(task="digits", part="dev", arm="x", seed=0, steps=100, fraction=1.0)
    same = settings_digest(task, replace(arm, about="y"), key)
    assert settings_digest(task, arm, key) == same
    changed = [
        settings_digest(task, replace(arm, settings={"elision": {"keep_share": 0.4}}), key),
        settings_digest(task, arm, replace(key, seed=1)),
        settings_digest(task, arm, replace(key, steps=200)),
        settings_digest(task, arm, replace(key, part="test")),
        settings_digest(replace(task, num_train=7), arm, key),
        settings_digest(replace(task, settings={"optimizer": {"lr": 0.1}}), arm, key),
    ]
    assert len({same, *changed}) == 7
