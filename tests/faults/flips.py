"""``python -m tests.faults.flips [--flips N] [--rows FILE]``: one changed bit in what we write.

In turn, a bit of a random byte of a random file of each kind is changed: reference store, image
orders, index of the data, run folder, checkpoint. Then a run reads it. A flip is *found* if the run
ends with a line, *harmless* if its result is the undisturbed one, bit for bit; it must be neither
*silent* nor a *traceback*. A flip whose row is in FILE is not tried again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.faults.jobs import JOBS, prepare, result_of, start, wait

_TRAINS = replace(
    JOBS["train on one rank"],
    settings=("elision.images.ranking=diversity", "run.save_every=6", "run.eval_every=6"),
)


@dataclass(frozen=True)
class Kind:
    """Files of one kind, and the run that reads them."""

    folder: str
    """What is copied, relative to the folder of all."""

    wants: Callable[[str], bool] = lambda name: True
    """Whether a file may be changed, by its name inside."""

    is_run: bool = False
    """Whether it is a run to be gone on with; else a new run reads it."""


KINDS = {
    "reference store": Kind("store"),
    "image orders": Kind("orders"),
    "index of the data": Kind("cache"),
    "run folder": Kind("half", wants=lambda name: not name.startswith("checkpoints/"), is_run=True),
    "checkpoint": Kind("half", wants=lambda name: name.startswith("checkpoints/"), is_run=True),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--rows", type=Path, default=Path("build/faults/flips.jsonl"))
    args = parser.parse_args(arguments)
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    lines = args.rows.read_text().splitlines() if args.rows.is_file() else []
    rows = [json.loads(line) for line in lines]
    missing = sorted(set(range(args.flips)) - {row["flip"] for row in rows})
    with tempfile.TemporaryDirectory() as name:
        wanted = _prepare(Path(name)) if missing else {}
        for flip in missing:
            rows.append(_flip_once(flip, Path(name), wanted))
            with args.rows.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps(rows[-1]), flush=True)
    for kind in KINDS:
        ends = [row["end"] for row in rows if row["kind"] == kind]
        counts = {end: ends.count(end) for end in ("found", "harmless", "traceback", "silent")}
        print(f"{kind}: {len(ends)} flips, {counts}")
    return int(any(row["end"] in ("silent", "traceback") for row in rows))


def _prepare(folder: Path) -> dict[str, Any]:
    """Make one of each kind; return what an undisturbed run ends with."""
    prepare(folder)
    unflipped = _settings(folder)
    assert wait(start(JOBS["rank"], folder, folder / "orders", unflipped)) == [0]
    assert wait(start(_TRAINS, folder, folder / "half", unflipped)) == [0]
    wanted = result_of(folder / "half")
    checkpoints = folder / "half" / "checkpoints"
    assert (checkpoints / "latest").read_text() == "step-000012"
    for later in (checkpoints / "step-000012", folder / "half" / "model"):
        shutil.rmtree(later)
    (folder / "half" / "summary.json").unlink()
    (checkpoints / "latest").write_text("step-000006")
    return wanted


def _settings(folder: Path, **changed: Path) -> list[str]:
    """Return the settings that name a run's stores; ``changed`` by the name in the folder."""
    named = {"store": "teacher.store", "orders": "rank.store", "cache": "data.cache"}
    return [f"{key}={changed.get(name, folder / name)}" for name, key in named.items()]


def _flip_once(flip: int, folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    draw = random.Random(flip)
    name = list(KINDS)[flip % len(KINDS)]
    kind = KINDS[name]
    copy = folder / f"flipped-{flip}"
    shutil.copytree(folder / kind.folder, copy)
    files = sorted(p for p in copy.rglob("*") if p.is_file() and p.stat().st_size)
    path = draw.choice([p for p in files if kind.wants(p.relative_to(copy).as_posix())])
    content = bytearray(path.read_bytes())
    place, bit = draw.randrange(len(content)), draw.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    row = {"flip": flip, "kind": name, "file": path.relative_to(copy).as_posix(), "at": place}
    return {**row, **_end_of(kind, copy, folder, wanted)}


def _end_of(kind: Kind, copy: Path, folder: Path, wanted: dict[str, Any]) -> dict[str, str]:
    """Run what reads the changed copy; return how it ended, and the line that it said."""
    out = copy if kind.is_run else folder / f"{copy.name}-run"
    if kind.is_run:
        more = [*_settings(folder), "run.resume=true"]
    else:
        more = _settings(folder, **{kind.folder: copy})
    codes = wait(start(_TRAINS, folder, out, more))
    said = out.with_name(f"{out.name}-0.log").read_text()
    last = said.strip().splitlines()[-1]
    if any(codes):
        end = "traceback" if "Traceback" in said else "found"
    else:
        is_told = "the figures of the first" in said
        end = "found" if is_told else "harmless" if result_of(out) == wanted else "silent"
    for left in {copy, out}:
        shutil.rmtree(left, ignore_errors=True)
    return {"end": end, "said": last}


if __name__ == "__main__":
    sys.exit(main())
