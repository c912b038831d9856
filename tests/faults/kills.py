"""``python -m tests.faults.kills [--seeds N] [--rows FILE]``: jobs that lose their machine.

Each job is killed by SIGKILL, all ranks at once, at a random moment of its length, and started
again by the same command. What it has made in the end must be what an undisturbed job makes, bit
for bit. A job that had ended before that moment is killed earlier in its life. A seed whose row is
in FILE is not run again. Prints how many were killed, and which were lost.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.faults.jobs import JOBS, kill, prepare, result_of, start, wait


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=25, help="kills of each job")
    parser.add_argument("--rows", type=Path, default=Path("build/faults/kills.jsonl"))
    args = parser.parse_args(arguments)
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in _lines(args.rows)]
    done = {(row["job"], row["seed"]) for row in rows}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for job in JOBS:
            missing = [seed for seed in range(args.seeds) if (job, seed) not in done]
            rows += _kill_each(job, missing, folder, args.rows)
    for job in JOBS:
        own = [row for row in rows if row["job"] == job]
        lost = [row["seed"] for row in own if row["lost"]]
        print(f"{job}: killed {len(own)}, lost {len(lost)} {lost or ''}")
    return int(any(row["lost"] for row in rows))


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _last_line(out: Path) -> str:
    return (_lines(out.with_name(f"{out.name}-0.log")) or [""])[-1]


def _kill_each(job: str, seeds: list[int], folder: Path, rows: Path) -> list[dict[str, Any]]:
    if not seeds:
        return []
    whole = folder / f"{job}-whole"
    began = time.monotonic()
    codes = wait(start(JOBS[job], folder, whole))
    seconds = time.monotonic() - began
    assert not any(codes), f"{job} failed undisturbed: {codes}, {_last_line(whole)}"
    wanted, found = result_of(whole), []
    for seed in seeds:
        row = {"job": job, "seed": seed, **_kill_once(job, seed, folder, seconds, wanted)}
        found.append(row)
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    return found


def _kill_once(
    job: str, seed: int, folder: Path, seconds: float, wanted: dict[str, Any]
) -> dict[str, Any]:
    out = folder / f"{job}-{seed}"
    moment = random.Random(seed).uniform(0, seconds)
    while not _is_killed(job, folder, out, moment):
        shutil.rmtree(out)
        moment *= 0.7
    codes = wait(start(JOBS[job], folder, out))
    lost = ""
    if any(codes):
        lost = f"exit codes {codes}: {_last_line(out)}"
    elif differing := _differing(result_of(out), wanted):
        lost = f"differs: {', '.join(differing)}"
    if not lost:
        shutil.rmtree(out, ignore_errors=True)
    return {"after": round(moment, 2), "lost": lost}


def _is_killed(job: str, folder: Path, out: Path, moment: float) -> bool:
    """Start the job and kill it after ``moment`` seconds; False if all ranks had ended by then."""
    ranks = start(JOBS[job], folder, out)
    time.sleep(moment)
    kill(ranks)
    return -signal.SIGKILL in wait(ranks)


def _differing(mine: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return sorted(name for name in {*mine, *wanted} if mine.get(name) != wanted.get(name))


if __name__ == "__main__":
    sys.exit(main())
