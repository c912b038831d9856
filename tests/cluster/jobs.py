"""What the cluster checks start, and what they read of it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT
from tests.support.small_corpus import make_corpus

STEPS = 300
"""Long enough to be interrupted."""

FAILURE = 5
"""Exit code of a rank that fails."""

_FAILS = f"""
import os, sys, threading, time

def fail():
    after = os.environ.get("FAILS_AFTER")
    while after and not (os.path.isfile(after) and os.path.getsize(after)):
        time.sleep(0.05)
    os._exit({FAILURE})

rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
_, _, module = " ".join(sys.orig_argv).partition(" -m ")
if rank == os.environ.get("FAILING_RANK") and module.startswith("regate_ds.cli "):
    if "FAILS_AFTER" in os.environ:
        threading.Thread(target=fail, daemon=True).start()
    else:
        fail()
"""
"""Ends rank FAILING_RANK: at its start, or once the file FAILS_AFTER holds something."""


def prepare(folder: Path) -> dict[str, str]:
    """A small task in ``folder``, and the environment in which its jobs run."""
    make_corpus(folder)
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(_FAILS)
    return {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": f"{ROOT}:{folder / 'site'}",
        "MASTER_ADDR": "127.0.0.1",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "RANKS": "1",
    }


def training(folder: Path, out: str, steps: int = 4) -> list[str]:
    """`train` and its arguments: one sample a rank and step, a JSON with blanks and braces."""
    zero = "run.deepspeed={zero_optimization: {stage: 1}}"
    sizes = [f"run.steps={steps}", "run.micro_batch=1", "run.accumulation=1", "run.save_every=0"]
    return ["train", str(folder / "run.yaml"), f"run.out={folder / out}", zero, *sizes]


def rows(folder: Path, out: str) -> list[dict[str, Any]]:
    """Metrics without the times."""
    path = folder / out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    timed = {"step_seconds", "cpu_seconds"}
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def summary(folder: Path, out: str) -> dict[str, Any]:
    return json.loads((folder / out / "summary.json").read_text())


def wait_for(holds: Callable[[], bool], what: str, seconds: float = 400.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.2)


def passed(what: str, since: float) -> None:
    print(f"ok  {what} ({time.monotonic() - since:.0f} s)", flush=True)
