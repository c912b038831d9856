"""A round of tiny runs in one process: its jobs are called, not started, to save their imports."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from regate_ds.job.process import start_process
from regate_ds.recipe import teacher_job
from regate_ds.recipe.learning import command, cost_job, run_round, train_job
from regate_ds.recipe.students.llava import build_llava
from regate_ds.recipe.students.student import save_student
from regate_ds.recipe.tasks.digits.task import DIGITS_TASK
from regate_ds.recipe.tasks.pretraining.tokenizer import train_tokenizer
from regate_ds.recipe.tasks.table import TASKS
from regate_ds.recipe.tasks.task import StudentFields, Task
from tests.support.small_corpus import TEXT, VISION

STEPS = 4


def tiny_student(train: Path, cache: Path, seed: int, fields: StudentFields) -> Path:
    folder = cache / f"student-{seed}"
    if not folder.is_dir():
        records = json.loads(train.read_text())
        texts = [part["value"] for record in records for part in record["conversations"]]
        tokenizer = train_tokenizer(texts, vocab_size=400)
        save_student(build_llava(tokenizer, text=TEXT, vision=VISION, seed=seed), folder)
    return folder


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))


def write_files(files: Path) -> None:
    config = {
        "data": {"max_length": 256, "num_workers": 0},
        "elision": {"keep_share": 0.5, "schedule": {"warmup": 1, "final_dense_share": 0.25}},
        "run": {"micro_batch": 2, "precision": "fp32"},
    }
    task = {
        "about": "tiny",
        "builder": "tiny",
        "config": str(files / "run.yaml"),
        "steps": STEPS,
        "num_train": 8,
        "num_dev": 4,
        "num_test": 4,
        "test_seed": 9,
    }
    plan = {"about": "x", "part": "dev", "tasks": ["tiny"], "arms": ["dense", "mine"], "seeds": [0]}
    write(files / "run.yaml", config)
    write(files / "tasks" / "tiny.yaml", task)
    write(files / "rounds" / "small.yaml", plan)
    write(files / "arms" / "dense.yaml", {"about": "x", "settings": {"elision": NO_ELISION}})
    write(files / "arms" / "mine.yaml", {"about": "x"})


NO_ELISION = {"execution": "none"}

started: list[str] = []


def call_job(job: str, arguments: Iterable[str], log: Path) -> tuple[int, Path]:
    """Stand in for a process of its own; an error is its exit code."""
    started.append(job)
    try:
        code = importlib.import_module(f"regate_ds.recipe.learning.{job}").main(list(arguments))
    except ValueError as error:
        log.write_text(str(error))
        return 1, log
    return code, log


def check_round(_: int, folder: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "tiny", Task(**{**vars(DIGITS_TASK), "make_student": tiny_student}))
        patch.setattr(run_round, "run_job", call_job)
        # A process joins a job once: deepspeed does not forget a group that has ended.
        process = start_process()
        for module in (teacher_job, train_job, cost_job):
            patch.setattr(module, "join_job", lambda *_: nullcontext(process))
        _check(Path(folder))


def _check(folder: Path) -> None:
    files, results = folder / "files", folder / "results"
    write_files(files)
    told = ["small", "--files", str(files), "--results", str(results), "--jobs", "1"]
    told += ["--work", str(folder / "work")]
    assert command.main([*told, "--costs"]) == 0
    assert started == ["once_job", "train_job", "train_job", "cost_job"]
    _check_figures(results)

    # Nothing is left to run, so that even the data may be gone.
    (folder / "work").rename(folder / "gone")
    assert command.main(told) == 0
    assert not (folder / "work").exists()
    (folder / "gone").rename(folder / "work")

    # Runs are not put beside those of another student of the seed.
    mine = results / "tiny" / "dev" / "mine-seed0-steps4.json"
    dense, kept = results / "tiny" / "dev" / "dense-seed0-steps4.json", mine.read_text()
    own = json.loads(kept)["student"]
    assert len(own) == 12
    mine.write_text(kept.replace(own, "a" * 12))
    of_dense = dense.read_text()
    dense.unlink()
    num_started = len(started)
    with pytest.raises(ValueError, match=f"mine-seed0-steps4 started from student a+, .* {own} of"):
        command.main(told)
    assert len(started) == num_started
    mine.write_text(kept)
    dense.write_text(of_dense)

    # Costs of an arm that was changed are refused, and then timed again or deleted.
    costs = results / "tiny" / "costs" / "small-seed0.json"
    write(files / "arms" / "mine.yaml", {"about": "x", "settings": {"optimizer": {"lr": 1e-2}}})
    (results / "tiny" / "dev" / "mine-seed0-steps4.json").rename(folder / "kept.json")
    with pytest.raises(ValueError, match="the arm mine was timed with other settings"):
        command.main(told)
    (folder / "kept.json").rename(results / "tiny" / "dev" / "mine-seed0-steps4.json")
    costs.unlink()

    # An arm that fails is named, and the others go on.
    mine.unlink()
    write(files / "arms" / "mine.yaml", {"about": "x", "settings": {"elision": {"first_layer": 9}}})
    dense.unlink()
    assert command.main(told) == 1
    assert dense.is_file()
    assert not mine.is_file()

    # So is one whose settings are refused before it starts.
    dense.unlink()
    write(files / "arms" / "mine.yaml", {"about": "x", "settings": {"elision": {"keep_share": 2}}})
    assert command.main(told) == 1
    assert dense.is_file()

    # An arm that was changed is refused, and its result is kept.
    write(files / "arms" / "dense.yaml", {"about": "x"})
    with pytest.raises(ValueError, match=r"dense-seed0-steps4\.json was made with other settings"):
        command.main(told)
    assert dense.is_file()


def _check_figures(results: Path) -> None:
    dense, mine = (
        json.loads((results / "tiny" / "dev" / f"{arm}-seed0-steps4.json").read_text())
        for arm in ("dense", "mine")
    )
    assert (dense["num_dense"], dense["num_sparse"], dense["kept_recall"]) == (4, 0, None)
    assert (mine["num_dense"], mine["num_sparse"]) == (2, 2)
    assert 0 <= mine["kept_recall"] <= 1
    assert mine["answer_tokens_processed"] < dense["answer_tokens_processed"]
    assert mine["num_words_visual"] == dense["num_words_visual"] > 0
    costs = json.loads((results / "tiny" / "costs" / "small-seed0.json").read_text())
    assert costs["once"]["mine"] > costs["once"]["dense"] == 0.0
    assert costs["steps"]["mine"]["sparse"] > 0
    assert costs["steps"]["dense"]["sparse"] is None
    assert (results / "small.md").read_text().startswith("### tiny, dev: 2 of 2 runs")
