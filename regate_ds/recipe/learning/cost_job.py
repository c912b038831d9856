"""What a dense and a sparse step of each arm cost: all arms take turns in one process.

    python -m regate_ds.recipe.learning.cost_job OUT ARM=CONFIG ...

Each arm trains a short run with its whole schedule, so that shares that move are met as they are in
a long one. A step counts with reading its samples, its plan, its passes and its optimizer.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from regate_ds.job.ranks import announce
from regate_ds.job.supervise import join_job
from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.corpus import load_corpus
from regate_ds.recipe.trainer import Trainer
from regate_ds.stores.atomic_file import write_atomically


class TimedRun(Trainer):
    """A run that is stepped from outside."""

    def steps(self) -> Iterator[tuple[bool, float]]:
        """Run one step after the other; yield whether it was dense, and its CPU seconds."""
        windows = self.engine.windows(self.loader(0))
        while True:
            begin = time.process_time()
            window = next(windows, None)
            if window is None:
                return
            losses = self.engine.run_step(window)
            # float() waits for the device.
            float(torch.stack(losses).sum())
            self.engine.end_step()
            counts = self.engine.counts()
            yield counts is None or counts["dense"], time.process_time() - begin


def main(arguments: Sequence[str]) -> int:
    out, *arms = arguments
    torch.set_num_threads(1)
    announce()
    with join_job("cost") as process:
        runs: dict[str, Iterator[tuple[bool, float]]] = {}
        for one in arms:
            name, _, path = one.partition("=")
            config = load_config(Path(path))
            runs[name] = TimedRun(config, load_corpus(config), process).steps()
        found = take_turns(runs)
    write_atomically(Path(out), (json.dumps(found, indent=1) + "\n").encode())
    return 0


def take_turns(runs: dict[str, Iterator[tuple[bool, float]]]) -> dict[str, Any]:
    """Step all runs in turns to their ends; return the mean seconds of their kinds of step.

    The first step of each is left out: it warms up. A kind that a run does not have is None.
    """
    seconds: dict[str, dict[bool, list[float]]] = {name: {True: [], False: []} for name in runs}
    for run in runs.values():
        next(run, None)
    left = dict(runs)
    while left:
        for name, run in list(left.items()):
            step = next(run, None)
            if step is None:
                del left[name]
            else:
                seconds[name][step[0]].append(step[1])
    return {
        name: {
            "dense": _mean(own[True]),
            "sparse": _mean(own[False]),
            "num_timed": [len(own[True]), len(own[False])],
        }
        for name, own in seconds.items()
    }


def _mean(seconds: list[float]) -> float | None:
    return statistics.fmean(seconds) if seconds else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
