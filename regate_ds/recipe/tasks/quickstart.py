"""`make quickstart`: a task's runs from nothing, on two data-parallel ranks of this node.

    python -m regate_ds.recipe.tasks.quickstart [TASK]

It builds the data and the student, computes the teacher's losses, trains the dense run and the
ReGATE run from the same weights in the same order, and compares them. All files go to
runs/quickstart/.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from regate_ds.job.deepspeed_launcher import launch, report
from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.learning.recorded import recorded_line
from regate_ds.recipe.learning.result import student_of
from regate_ds.recipe.reports.compare import compare_runs
from regate_ds.recipe.reports.cost import cost_line
from regate_ds.recipe.reports.sample import picture_sample
from regate_ds.recipe.run_folder import RunFolder
from regate_ds.recipe.tasks.table import TASKS
from regate_ds.recipe.tasks.task import StudentFields, Task

ROOT = Path("runs/quickstart")
RANKS = 2

RECORDED, ARM, DENSE_ARM = Path("docs/learning"), "quickstart", "dense"
"""Where the learning benchmark's results are, and its arms with the settings of these runs."""

MARGIN = 0.04
"""How far below dense one elided run may end: two to three standard errors of the difference."""

RUNS = {
    # A few steps with the host's own loss and head, to measure their time; it is not evaluated.
    "host": ["elision.enabled=false", "run.steps=20", "run.eval_every=0", "data.test=null"],
    "dense": ["elision.execution=none"],
    "regate": [],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts; if one fails, exit with its exit code."""
    parser = argparse.ArgumentParser(description="Train and compare a task's runs from nothing.")
    parser.add_argument("task", nargs="?", choices=TASKS, default="digits")
    name = parser.parse_args(arguments).task
    task = TASKS[name]
    begin = time.monotonic()
    # Matrices this small gain nothing from more threads, which would wait for each other.
    torch.set_num_threads(1)
    with _timed("data"):
        task.build_data(_data_arguments(task, ROOT / "data"))
    with _timed("student"):
        student = task.make_student(
            ROOT / "data" / "train.json", ROOT / "cache", 0, StudentFields()
        )
    _put_in_place(student)
    with _timed("teacher"):
        _launch(["teacher", str(task.config)])
    for run, settings in RUNS.items():
        with _timed(f"training, {run}"):
            out = ROOT / run
            shutil.rmtree(out, ignore_errors=True)
            _launch(["train", str(task.config), *settings, f"run.out={out}"])
    picture_sample(load_config(task.config), ROOT / "sample.png")
    print(f"\n{compare_runs([ROOT / run for run in RUNS], out=ROOT)}")
    pictures = ", ".join(sorted(path.name for path in ROOT.glob("*.png")))
    print(f"\n{ROOT}: compare.json, {pictures}")
    found = _judged(task)
    print(f"judged by {task.judged_by}: {', '.join(f'{n} {v:.3f}' for n, v in found.items())}")
    print(cost_line(RunFolder(ROOT / "dense"), RunFolder(ROOT / "regate")))
    steps = load_config(task.config).run.steps
    if beside := recorded_line(RECORDED, name, ARM, against=DENSE_ARM, steps=steps):
        print(beside)
    print(f"quickstart: {time.monotonic() - begin:.0f} s")
    return _verdict(found["dense"], found["regate"])


def _data_arguments(task: Task, out: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    task.add_arguments(parser)
    return parser.parse_args([str(out)])


def _judged(task: Task) -> dict[str, float]:
    """Return the task's own figure of each run that was evaluated."""
    summaries = {name: RunFolder(ROOT / name).summary() for name in RUNS}
    return {name: row[task.judged_by] for name, row in summaries.items() if task.judged_by in row}


def _verdict(dense: float, regate: float) -> int:
    """Return 0, or 1 if the elided run is worse than one run of each can explain."""
    if regate >= dense - MARGIN:
        return 0
    print(
        f"regate is {dense - regate:.3f} below dense, more than {MARGIN}: read the figures in "
        f"{ROOT}",
        file=sys.stderr,
    )
    return 1


def _put_in_place(student: Path) -> None:
    """Copy a student to where the configurations have it; losses for another one are deleted."""
    place = ROOT / "student"
    if not place.is_dir() or student_of(place) != student_of(student):
        shutil.rmtree(ROOT / "reference", ignore_errors=True)
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(student, place)


def _launch(arguments: list[str]) -> None:
    """Run a regate command on all ranks by the deepspeed launcher; if it fails, exit as it does."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore::FutureWarning"}
    if not torch.cuda.is_available():
        # One thread for each rank: two ranks with all cores each would fight for them.
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    code, error_line = launch(RANKS, arguments, environment)
    if code:
        report(code, error_line)
        sys.exit(code)


@contextmanager
def _timed(part: str) -> Iterator[None]:
    begin = time.monotonic()
    print(f"== {part}", flush=True)
    yield
    print(f"== {part}: {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
