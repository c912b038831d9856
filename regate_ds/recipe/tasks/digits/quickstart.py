"""`make quickstart`: the main job from nothing, on two data-parallel ranks of this machine.

Builds the data and the student, computes the teacher's losses, trains the dense run and the ReGATE
run from the same weights in the same order, and compares them. All of it lands in runs/quickstart/.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml

from regate_ds.job.deepspeed_launcher import launch, report
from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.reports.compare import compare_runs
from regate_ds.recipe.reports.sample import picture_sample
from regate_ds.recipe.tasks.digits.scenes import build_digits
from regate_ds.recipe.tasks.digits.student import PretrainConfig, make_digits_student

ROOT = Path("runs/quickstart")
CONFIG = Path("configs/digits.yaml")
RANKS = 2

STUDENT = PretrainConfig(
    text={
        "model_type": "llama",
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        # Words told by the head are the words that the projector learns to say.
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
    },
    vision={
        "model_type": "clip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 48,
        # A token for each cell: a quarter of a digit does not tell which one it is.
        "patch_size": 16,
        "projection_dim": 64,
    },
)

RUNS = {
    # A few steps of the host's own loss and head, for its time a step; it is not evaluated.
    "host": ["elision.enabled=false", "run.steps=40", "run.eval_every=0", "data.test=null"],
    "dense": ["elision.keep_share=1.0"],
    "regate": [],
}


def main() -> int:
    """Run all of it; the exit code is that of the first one that fails."""
    begin = time.monotonic()
    # Matrices this small gain nothing from more, and on a busy machine threads wait for each other.
    torch.set_num_threads(1)
    with _timed("data"):
        build_digits(ROOT / "data", num_train=3000, num_test=300, seed=0)
    with _timed("student"):
        student = make_digits_student(ROOT / "data" / "train.json", ROOT / "cache", STUDENT)
    overrides = _overrides(student)
    with _timed("teacher"):
        _launch(["teacher", str(CONFIG), *overrides])
    for name, settings in RUNS.items():
        with _timed(f"training, {name}"):
            out = ROOT / name
            shutil.rmtree(out, ignore_errors=True)
            _launch(["train", str(CONFIG), *overrides, *settings, f"run.out={out}"])
    picture_sample(load_config(CONFIG, overrides), ROOT / "sample.png")
    print(f"\n{compare_runs([ROOT / name for name in RUNS], out=ROOT)}")
    print(f"\n{ROOT}: compare.json, accuracy_over_tokens.png, accuracy_over_time.png, sample.png")
    print(f"quickstart: {time.monotonic() - begin:.0f} s")
    return 0


def _overrides(student: Path) -> list[str]:
    values = {
        "model.path": student,
        "data.train": ROOT / "data" / "train.json",
        "data.test": ROOT / "data" / "test.json",
        "teacher.store": ROOT / "reference" / student.name,
    }
    return [f"{key}={yaml.safe_dump(str(value)).splitlines()[0]}" for key, value in values.items()]


def _launch(arguments: list[str]) -> None:
    """Run a regate command on all ranks by the deepspeed launcher; exit as it does if it fails."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore::FutureWarning"}
    if not torch.cuda.is_available():
        # One thread for each rank: two ranks with all cores each would fight for them.
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    code, said = launch(RANKS, arguments, environment)
    if code:
        report(code, said)
        sys.exit(code)


@contextmanager
def _timed(part: str) -> Iterator[None]:
    begin = time.monotonic()
    print(f"== {part}", flush=True)
    yield
    print(f"== {part}: {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
