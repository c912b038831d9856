"""One run of the benchmark in a process of its own: trains, counts the words kept, writes a result.

python -m regate_ds.recipe.learning.train_job CONFIG RESULT ARM SEED FRACTION DIGEST
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from regate_ds.job.preemption import StopRequest
from regate_ds.job.ranks import announce
from regate_ds.job.supervise import join_job
from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.corpus import load_corpus
from regate_ds.recipe.learning.result import Result, student_of, write_result
from regate_ds.recipe.learning.words_kept import LabelledWord, WordsKept, labelled_words
from regate_ds.recipe.preflight import judge_run
from regate_ds.recipe.trainer import Trainer


class LearningTrainer(Trainer):
    """A run that also counts which words its sparse steps keep."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kept = WordsKept()
        self._words: dict[int, list[LabelledWord]] = {}

    def train_step(self, step: int, window: Any, stop: StopRequest) -> dict[str, Any]:
        row = super().train_step(step, window, stop)
        if not row["dense"]:
            self._count(window)
        return row

    def _count(self, window: Any) -> None:
        for tokens, plan in window.planned():
            rows = self.corpus.index.rows(tokens.flat_keys)
            words = [self._words_of(row) for row in rows]
            self.kept.add(words, tokens, plan)

    def _words_of(self, row: int) -> list[LabelledWord]:
        if row not in self._words:
            sample = self.corpus.train.encode(row)
            self._words[row] = labelled_words(self.corpus.train_records[row], sample)
        return self._words[row]


def main(arguments: Sequence[str]) -> int:
    config_path, result, arm, seed, fraction, digest = arguments
    torch.set_num_threads(1)
    announce()
    config = load_config(Path(config_path))
    judge_run(config)
    assert config.model.path is not None
    student = student_of(config.model.path)
    with join_job("train") as process:
        trainer = LearningTrainer(config, load_corpus(config), process)
        summary = trainer.run()
    rows = trainer.folder.metrics()
    num_dense = sum(row["dense"] for row in rows)
    names = Result.__dataclass_fields__.keys() & summary.keys()
    write_result(
        Path(result),
        Result(
            arm=arm,
            seed=int(seed),
            fraction=float(fraction),
            digest=digest,
            student=student,
            date=datetime.now(UTC).date().isoformat(),
            machine=f"{platform.machine()}, {platform.system()}, torch {torch.__version__}",
            num_dense=num_dense,
            num_sparse=len(rows) - num_dense,
            kept_precision=trainer.kept.precision,
            kept_recall=trainer.kept.recall,
            **{name: summary[name] for name in names},
        ),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
