"""``python -m tests.faults.lost_ranks [--seeds N]``: one of 2 to 4 ranks is killed, or stopped.

At a random moment of a training run one rank gets SIGKILL or SIGSTOP. The others must end within
``BOUND`` seconds with a line that names it. Prints a row for each, and how many were not so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.faults.jobs import JOBS, prepare, start

PATIENCE = 10
"""Seconds without a sign of life, as the runs are told."""

BOUND = 60
"""Seconds until all others must have ended; machines of tests are slow."""

_SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8, help="of each way and number of ranks")
    args = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for num_ranks in (2, 3, 4):
            for how in _SIGNALS:
                for seed in range(args.seeds):
                    rows.append(_lose_one(how, num_ranks, seed, Path(name)))
                    print(json.dumps(rows[-1]), flush=True)
    bad = [row for row in rows if row["fault"]]
    print(f"tried {len(rows)}, not ended or not named: {len(bad)}")
    return int(bool(bad))


def _lose_one(how: str, num_ranks: int, seed: int, folder: Path) -> dict[str, Any]:
    draw = random.Random(f"{how} {num_ranks} {seed}")
    settings = ("run.steps=200", "run.accumulation=1", "run.micro_batch=1", "run.save_every=2")
    out = folder / f"{how}-{num_ranks}-{seed}"
    job = replace(JOBS["train on two ranks"], num_ranks=num_ranks, settings=settings)
    ranks = start(job, folder, out, [f"run.hang_seconds={PATIENCE}"])
    _wait_for_steps(out, draw.randrange(6))
    time.sleep(draw.uniform(0, 2))
    lost = draw.randrange(num_ranks)
    os.kill(ranks[lost], _SIGNALS[how])
    began = time.monotonic()
    others = [pid for pid in ranks if pid != ranks[lost]]
    codes = _codes(others, began + BOUND)
    seconds = round(time.monotonic() - began, 1)
    os.kill(ranks[lost], signal.SIGKILL)
    os.waitpid(ranks[lost], 0)
    said = "".join(
        out.with_name(f"{out.name}-{rank}.log").read_text()
        for rank in range(num_ranks)
        if rank != lost
    )
    fault = ""
    if None in codes:
        fault = f"exit codes {codes} after {BOUND} s"
    elif 0 in codes:
        fault = f"exit codes {codes}"
    elif not re.search(rf"rank {lost}: has (ended without a word|given no sign of life)", said):
        fault = f"nobody names rank {lost}: {said.strip().splitlines()[-1:]}"
    return {"how": how, "ranks": num_ranks, "lost": lost, "seconds": seconds, "fault": fault}


def _wait_for_steps(out: Path, num_steps: int) -> None:
    metrics = out / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_text().count("\n") < num_steps:
        time.sleep(0.1)


def _codes(pids: list[int], deadline: float) -> list[int | None]:
    """Return the exit codes; None for a process that had to be killed at the deadline."""
    codes: dict[int, int | None] = {}
    while len(codes) < len(pids) and time.monotonic() < deadline:
        for pid in pids:
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    for pid in pids:
        if pid not in codes:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            codes[pid] = None
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    sys.exit(main())
