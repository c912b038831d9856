"""Every layout with every way to run it, against the plain model; the table of docs/numerics.md.

    python -m tests.adapters.megatron.matrix run FILE.json [TEXT]
    python -m tests.adapters.megatron.matrix write FILE.json...

``run`` on each version of megatron-core, only layouts whose name holds the text; ``write`` makes
the table from what was run.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.adapters.megatron.cases_helper import Case
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "numerics.md"
_PACKED_CP = {"packed": True, "rows": 1, "length": 48}
"""Samples in which two images are long enough to lose a token."""

LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "TP2": {"tp": 2},
    "TP2 SP": {"tp": 2, "sp": True},
    "PP2": {"pp": 2},
    "PP4": {"pp": 4},
    "PP2 VPP2": {"pp": 2, "vpp": 2},
    "TP2 PP2": {"tp": 2, "pp": 2, "sp": True},
    "CP2 (own attention)": {"cp": 2},
    "CP2 TP2 SP (own attention)": {"cp": 2, "tp": 2, "sp": True},
    "DP2": {"dp": 2},
    "DP2 PP2": {"dp": 2, "pp": 2},
    "MoE EP2 DP2": {"dp": 2, "ep": 2, "model": "moe"},
    "LLaVAModel": {"model": "llava"},
    "LLaVAModel PP2": {"model": "llava", "pp": 2},
    "LLaVAModel TP2": {"model": "llava", "tp": 2},
    "LLaVAModel DP2": {"model": "llava", "dp": 2},
    "LLaVAModel TP2 PP2": {"model": "llava", "tp": 2, "pp": 2},
    "one process, last_layer 3": {"last_layer": 3},
    "TP2 SP, last_layer 3": {"tp": 2, "sp": True, "last_layer": 3},
    "CP2, last_layer 3 (own attention)": {"cp": 2, "last_layer": 3},
    "PP2, last_layer 2": {"pp": 2, "last_layer": 2},
    "PP2, last_layer 3": {"pp": 2, "last_layer": 3},
    "PP4, last_layer 2": {"pp": 4, "last_layer": 2},
    "PP4, last_layer 3": {"pp": 4, "last_layer": 3},
    "TP2 PP2, last_layer 3": {"tp": 2, "pp": 2, "sp": True, "last_layer": 3},
    "LLaVAModel PP2, last_layer 3": {"model": "llava", "pp": 2, "last_layer": 3},
    "yarn, TP2 SP": {"positions": "yarn", "tp": 2, "sp": True},
    "mrope": {"positions": "mrope"},
    "mrope, PP2 VPP2": {"positions": "mrope", "pp": 2, "vpp": 2},
    "mrope, CP2 TP2 SP (own attention)": {"positions": "mrope", "cp": 2, "tp": 2, "sp": True},
    "packed": {"packed": True, "rows": 1},
    "packed, TP2 SP": {"packed": True, "rows": 1, "tp": 2, "sp": True},
    "packed, PP2": {"packed": True, "rows": 1, "pp": 2},
    "packed, CP2 (own attention)": {**_PACKED_CP, "cp": 2},
    "packed, CP2 PP2 (own attention)": {**_PACKED_CP, "cp": 2, "pp": 2},
    "packed, CP2 TP2 SP (own attention)": {**_PACKED_CP, "cp": 2, "tp": 2, "sp": True},
    "TP2 PP2 DP2": {"tp": 2, "pp": 2, "dp": 2, "sp": True},
}


def cases() -> list[tuple[str, Case]]:
    made = []
    for (name, sizes), rows, first, recompute in itertools.product(
        LAYOUTS.items(), ("padded", "ragged"), (0, 1), ("none", "full", "selective")
    ):
        # What is recomputed inside a layer is far from the restore, and takes any angles.
        if ("last_layer" in sizes or "positions" in sizes) and recompute == "selective":
            continue
        # Padded rows cannot keep samples apart.
        if "packed" in sizes and rows == "padded":
            continue
        share = 0.5 if (rows == "padded") == (first == 1) else 1.0
        fields = {"row_format": rows, "first_layer": first, "image_share": share}
        case = Case(**sizes, **fields, recompute=recompute)
        # Eight processes on the few cores of a test machine: once.
        if case.world > 4 and (first, recompute, rows) != (1, "full", "padded"):
            continue
        made.append((name, case))
    return sorted(made, key=lambda pair: pair[1].world)


def run(path: Path, only: str = "") -> int:
    from importlib.metadata import version

    from tests.adapters.megatron.checks_helper import check
    from tests.adapters.megatron.pool_helper import Pool

    pool, rows, failed = Pool(), [], 0
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, case in [pair for pair in cases() if only in pair[0]]:
        start = time.monotonic()
        row = {"name": name, "case": asdict(case), "loss": None, "gradient": None}
        try:
            reports = pool.run(case.world, check, case, timeout=180)
            row["loss"] = max(report.loss for report in reports)
            row["gradient"] = max(report.gradient for report in reports)
        except AssertionError as problem:
            failed += 1
            print(problem)
        rows.append(row)
        # After each, so that a run that is cut short tells of what it did.
        told = {"version": version("megatron-core"), "commit": commit(), "rows": rows}
        path.write_text(json.dumps(told, indent=1))
        print(f"{name}: {case}: {row['gradient']} ({time.monotonic() - start:.1f} s)", flush=True)
    pool.close()
    print(f"{len(rows) - failed} passed, {failed} failed")
    return 1 if failed else 0


def commit() -> str:
    asked = ["git", "-C", str(PAGE.parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


HEAD = """# Numbers

Written by `make test-matrix`: do not edit.

One optimizer step of a small model (4 layers, 4 micro-batches with very different counts) under
each layout of Megatron-core, against a plain model in one process that gathers, attends and
scatters in every layer, in double precision. Every gradient must hold
`||g - g*|| <= 1e-5 ||g*|| + 1e-7 ||all g*||` (or be off by no more than twice what
single precision alone makes of the plain model, and by 5e-5 at most), every loss the same; the
table shows the largest `||g - g*|| / (||g*|| + 0.01 ||all g*||)` of any parameter of any rank.
Single precision, CPU, gloo.
Padded rows from layer 1 and ragged rows from layer 0 also elide half of the tokens of two images a
sample.
"Own attention": the stock attention of Megatron-core on CPUs knows no context parallelism and no
packed sequences (thd), so that the tests bring one; on GPUs Transformer Engine's is used.
"last_layer n": the gated range ends before layer n of the four, and the full sequence goes on. Of f
full and k kept rows of a micro-batch, each of e pipeline edges inside the range carries k, and one
message past the stages between carries f - k: e k + (f - k) rows each way in place of e f. That is
nothing saved over one edge, and more the more there are (counted in
tests/adapters/megatron/test_loop.py).
A dash is a case that no run reached.
"""


def write(paths: list[Path]) -> int:
    runs = [json.loads(path.read_text()) for path in paths]
    versions = list(dict.fromkeys(one["version"] for one in runs))
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for one in runs:
        for row in one["rows"]:
            case = row["case"]
            key = (row["name"], case["row_format"], str(case["first_layer"]), case["recompute"])
            value = "**differs**" if row["gradient"] is None else f"{row['gradient']:.1e}"
            found.setdefault(key, {})[one["version"]] = value
    columns = ["layout", "rows", "first_layer", "recompute", *versions]
    parts = (f"{len(one['rows'])} of {one['version']} at {one['commit']}" for one in runs)
    lines = [HEAD, f"Cases, later runs over earlier ones: {', '.join(parts)}.", ""]
    lines += [_line(columns), _line(["---"] * len(columns))]
    lines += [_line([*key, *(row.get(v, "-") for v in versions)]) for key, row in found.items()]
    PAGE.write_text("\n".join(lines) + "\n")
    print(f"{PAGE}: {len(found)} cases, megatron-core {', '.join(versions)}")
    return 0


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    sys.exit(run(Path(rest[0]), *rest[1:]) if command == "run" else write([*map(Path, rest)]))
