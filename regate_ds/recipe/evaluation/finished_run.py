"""The job of `regate eval`: measure a finished run's model on its held-out questions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from regate_ds.data.llava.template import Template
from regate_ds.job.supervise import join_job
from regate_ds.job.watch import Signs
from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.corpus import held_out, open_corpus
from regate_ds.recipe.evaluation.generation import evaluate_generated
from regate_ds.recipe.evaluation.words import evaluate
from regate_ds.recipe.run_folder import RunFolder

NUM_GENERATED = 100
"""Number of held-out questions that `regate eval` also answers freely."""


def evaluate_run(folder: Path) -> dict[str, Any]:
    """Measure a finished run's model on its held-out questions, teacher-forced and generating."""
    run = RunFolder(folder)
    run.require_run()
    if not run.model.is_dir():
        raise ValueError(
            f"{folder} has no model/, so the run is not finished; finish it with run.resume=true"
        )
    config = load_config(run.config)
    if config.data.test is None:
        raise ValueError(
            f"data.test=None in {run.config}: there is nothing to evaluate on; name held-out "
            "samples there"
        )
    model = replace(config.model, path=run.model, text={}, vision={}, tokenizer=None, lora=None)
    data = config.data
    if config.model.path is None and data.template is None:
        # Its tokenizer may have brought a chat template, which the run did not use.
        data = replace(data, template=Template())
    with join_job("eval", Signs(patience=config.run.hang_seconds)) as process:
        corpus = open_corpus(replace(config, model=model, data=data))
        student = corpus.student.model.to(process.device)  # type: ignore[arg-type]
        questions = held_out(corpus, config)
        return {
            **evaluate(student, questions, process),
            **evaluate_generated(student, questions, process, num_samples=NUM_GENERATED),
        }
