from __future__ import annotations

from pathlib import Path

import pytest

from regate_ds.recipe.learning.files import Arm, LearningTask, read_file, settings_of
from regate_ds.recipe.learning.recorded import recorded_line
from regate_ds.recipe.learning.result import write_result
from regate_ds.recipe.tasks.digits.task import DIGITS_TASK
from regate_ds.recipe.tasks.quickstart import ARM, DENSE_ARM
from regate_ds.settings.yaml import read_yaml
from tests.recipe.learning.test_table import run
from tests.support.paths import ROOT

FILES = ROOT / "configs" / "learning"


def keep(results: Path, part: str, arm: str, seed: int, accuracy: float, steps: int = 300) -> None:
    path = results / "digits" / part / f"{arm}-seed{seed}-steps{steps}.json"
    write_result(path, run(arm, seed, accuracy)[1])


def line(results: Path) -> str | None:
    return recorded_line(results, "digits", "recommended", against="dense", steps=300)


def test_a_single_run_is_seen_beside_the_paired_difference(tmp_path: Path):
    assert line(tmp_path) is None
    for seed, ours, theirs in ((0, 0.42, 0.40), (1, 0.44, 0.43), (2, 0.41, 0.41)):
        keep(tmp_path, "dev", "recommended", seed, ours)
        keep(tmp_path, "dev", "dense", seed, theirs)
    keep(tmp_path, "dev", "dense", 3, 0.9)
    keep(tmp_path, "dev", "recommended", 3, 0.1, steps=200)
    # Student's t with two degrees of freedom: 4.3027 x .01 / sqrt(3) = .02484
    assert line(tmp_path) == (
        "the learning benchmark (digits, dev, seeds: 3) has recommended +0.010 from dense, 95 % "
        "interval [-0.015, +0.035]: one run says less"
    )


def test_the_test_part_comes_first_and_one_seed_has_no_interval(tmp_path: Path):
    for part, ours in (("dev", 0.5), ("test", 0.3)):
        keep(tmp_path, part, "recommended", 0, ours)
        keep(tmp_path, part, "dense", 0, 0.4)
    assert line(tmp_path) == (
        "the learning benchmark (digits, test, seeds: 1) has recommended -0.100 from dense: one "
        "run says less"
    )


def test_another_student_of_the_seed_is_no_pair(tmp_path: Path):
    keep(tmp_path, "dev", "recommended", 0, 0.5)
    path = tmp_path / "digits" / "dev" / "dense-seed0-steps300.json"
    write_result(path, run("dense", 0, 0.4, student="another")[1])
    assert line(tmp_path) is None


def test_the_arms_that_the_quickstart_names_have_its_settings():
    task = read_file(LearningTask, FILES / "tasks", "digits")
    ours, dense = (
        settings_of(task, read_file(Arm, FILES / "arms", arm)) for arm in (ARM, DENSE_ARM)
    )
    quickstart = read_yaml((ROOT / DIGITS_TASK.config).read_text())
    assert ours["elision"] == quickstart["elision"]
    assert dense["elision"]["execution"] == "none"
    rates = {run["optimizer"]["lr"] for run in (ours, dense, quickstart)}
    assert len(rates) == 1
    assert task.steps == quickstart["run"]["steps"]


def test_a_damaged_result_is_named(tmp_path: Path):
    keep(tmp_path, "test", "dense", 0, 0.4)
    next(tmp_path.rglob("*.json")).write_text("{")
    with pytest.raises(ValueError, match="dense-seed0-steps300.json is no result"):
        line(tmp_path)
