"""``python -m tests.faults.full_disk [--seeds N] [--rows FILE]``: jobs whose disk fills up.

As root, on a small tmpfs. Each job is given a random share of the bytes that it takes. It must end
with a line that tells of the room, and the same command on a larger disk must go on to what an
undisturbed job makes, bit for bit. A seed whose row is in FILE is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.jobs import JOBS, prepare, result_of, start, wait

TRIED = ("train on one rank", "train on two Megatron stages", "teacher", "rank")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="disks of each job")
    parser.add_argument("--rows", type=Path, default=Path("build/faults/full_disk.jsonl"))
    args = parser.parse_args(arguments)
    if os.geteuid() != 0:
        print("skipped: only root can mount a small disk")
        return 0
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    lines = args.rows.read_text().splitlines() if args.rows.is_file() else []
    rows = [json.loads(line) for line in lines]
    done = {(row["job"], row["seed"]) for row in rows}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for job in TRIED:
            for row in _fill_each(
                job, set(range(args.seeds)) - {s for j, s in done if j == job}, folder
            ):
                rows.append(row)
                with args.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    for job in TRIED:
        own = [row for row in rows if row["job"] == job]
        lost = [row["seed"] for row in own if row["lost"]]
        full = sum(row["was_full"] for row in own)
        print(f"{job}: tried {len(own)}, full {full}, lost {len(lost)} {lost or ''}")
    return int(any(row["lost"] for row in rows))


def _fill_each(job: str, seeds: set[int], folder: Path) -> Iterator[dict[str, Any]]:
    if not seeds:
        return
    whole = folder / f"{job}-whole"
    assert not any(wait(start(JOBS[job], folder, whole)))
    num_bytes = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    wanted = result_of(whole)
    for seed in sorted(seeds):
        share = random.Random(f"{job} {seed}").uniform(0.05, 0.95)
        with _disk(folder / f"{job}-{seed}", int(share * num_bytes)) as disk:
            row = _fill_once(job, folder, disk, wanted)
        yield {"job": job, "seed": seed, "share": round(share, 2), **row}


@contextmanager
def _disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    folder.mkdir()
    _mount(folder, f"size={num_bytes}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def _fill_once(job: str, folder: Path, disk: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    out, logs = disk / "out", []
    for rank in range(JOBS[job].num_ranks):
        # What is said lies on another disk.
        logs.append(folder / f"{disk.name}-{rank}.log")
        (disk / f"out-{rank}.log").symlink_to(logs[-1])
    codes = wait(start(JOBS[job], folder, out))
    said = "".join(log.read_text() for log in logs)
    row: dict[str, Any] = {"was_full": any(codes), "lost": ""}
    if any(codes):
        told = [line for line in said.splitlines() if "make room " in line]
        row["said"] = told[-1] if told else said[-300:]
        if not told or "Traceback" in said:
            row["lost"] = "no line tells of the room, or a traceback does"
        _mount(disk, "remount,size=1g")
        codes = wait(start(JOBS[job], folder, out))
    if any(codes):
        row["lost"] = f"exit codes {codes}: {logs[0].read_text()[-300:]}"
    elif not row["lost"] and result_of(out) != wanted:
        row["lost"] = "ends with something else"
    return row


if __name__ == "__main__":
    sys.exit(main())
