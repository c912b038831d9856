"""``python -m tests.recipe.rank_helper FOLDER``: rank and train, with two students.

Each command has a process of its own, forked from one that has imported what they need.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import deepspeed  # noqa: F401 (for the processes to come)

from regate_ds.cli import main
from regate_ds.recipe import rank_job, trainer  # noqa: F401 (likewise)

RUNS = {
    "student": (["ranking=mixed", "mixed.by=attention"], "attention contribution_share=0.5"),
    "qwen": (["ranking=diversity"], "diversity"),
}
"""For each student the ranking of its run under `elision.images`, and what is computed for it."""


def overrides(folder: Path, student: str) -> list[str]:
    settings, _ = RUNS[student]
    return [
        str(folder / "run.yaml"),
        f"model.path={folder / student}",
        f"run.out={folder / 'runs' / student}",
        f"rank.store={folder / 'orders' / student}",
        "rank.batch=3",
        "run.steps=3",
        "run.save_every=0",
        "elision.keep_share=1.0",
        "elision.schedule.warmup=1",
        "elision.schedule.final_dense_share=0",
        "elision.images.keep_share=0.25",
        *(f"elision.images.{setting}" for setting in settings),
    ]


def in_a_process(arguments: list[str]) -> int:
    if (child := os.fork()) == 0:
        code = 1
        try:
            code = main(arguments)
        except BaseException:
            # The process ends below, before Python would show it.
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_all(folder: Path) -> int:
    for student in RUNS:
        for command in ("rank", "train"):
            if code := in_a_process([command, *overrides(folder, student), "--debug"]):
                return code
    return 0


if __name__ == "__main__":
    sys.exit(run_all(Path(sys.argv[1])))
