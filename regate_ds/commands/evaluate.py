"""`regate eval`"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from regate_ds.commands.output import _print_on_first
from regate_ds.job.supervise import join_job
from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.corpus import _task, held_out
from regate_ds.recipe.evaluation.generation import evaluate_generated
from regate_ds.recipe.evaluation.words import evaluate
from regate_ds.recipe.run_folder import RunFolder


def _add_eval(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    text = "measure the accuracy of a finished run on held-out questions"
    evaluate = commands.add_parser("eval", parents=[debug], help=text, description=text)
    evaluate.add_argument("run_folder", type=Path, metavar="RUN", help="folder of the run")
    evaluate.set_defaults(run=_eval)


def _eval(args: argparse.Namespace, _: list[str]) -> int:
    from regate_ds.commands.evaluate import evaluate_run

    evaluate_run(args.run_folder)
    return 0


NUM_GENERATED = 100
"""Held-out questions that `regate eval` also answers freely."""


def evaluate_run(folder: Path) -> dict[str, Any]:
    """Measure a finished run's model on its held-out questions, teacher-forced and answering."""
    run = RunFolder(folder)
    run.require_run()
    if not run.model.is_dir():
        raise ValueError(f"{folder} has no model/: the run is not finished")
    config = load_config(run.config)
    if config.data.test is None:
        raise ValueError(
            f"data.test=None in {run.config}: there is nothing to evaluate on; name held-out "
            "samples there"
        )
    model = replace(config.model, path=run.model, text={}, vision={}, tokenizer=None, lora=None)
    with join_job("eval") as process:
        task = _task(replace(config, model=model))
        student = task.student.model.to(process.device)  # type: ignore[arg-type]
        questions = held_out(task, config)
        scores = {
            **evaluate(student, questions, process),
            **evaluate_generated(student, questions, process, num_samples=NUM_GENERATED),
        }
        return _print_on_first(scores)
