"""A small teacher's job, and a main that runs it until it is killed.

As a program: ``python -m tests.teacher.reference_job_helper STORE`` scores slowly and says each
batch on stdout, so that a test can kill it in the middle.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import torch

from regate_ds.teacher.precompute import TeacherJob, precompute
from regate_ds.teacher.scoring import score_samples
from tests.support.models import causal_lm
from tests.support.samples import make_index, make_samples

NUM_SAMPLES = 30


def make_job(store: Path, **changes) -> TeacherJob:
    torch.set_num_threads(1)
    samples = make_samples(NUM_SAMPLES)
    settings = {
        "index": make_index(NUM_SAMPLES),
        "encode": samples.__getitem__,
        "score": partial(score_samples, causal_lm().eval(), pad_id=1),
        "teacher_id": "small",
        "store": store,
        "tokens_per_batch": 48,
    }
    return TeacherJob(**{**settings, **changes})


def files_of(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


def _score_slowly(job: TeacherJob, samples) -> torch.Tensor:
    print("batch", flush=True)
    time.sleep(0.05)
    return job.score(samples)


if __name__ == "__main__":
    store = Path(sys.argv[1])
    precompute(make_job(store, score=partial(_score_slowly, make_job(store))))
