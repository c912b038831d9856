"""What the programs of this folder share: a row's comparisons, families on several cores."""

from __future__ import annotations

import json
import multiprocessing
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from regate_ds.algorithm.executions.table import EXECUTIONS
from tests.families.zoo.compare import Run, gradient_error, loss_error
from tests.families.zoo.models.family import Family
from tests.families.zoo.models.table import FAMILIES
from tests.support.planning import gate_layers

Row = dict[str, Any]

TOLERANCE = 1e-10


@contextmanager
def attached(model: Any, gated: range, execution: str = "elide") -> Iterator[None]:
    """Attach the adapter for the block."""
    attachment = gate_layers(
        model,
        first_layer=gated.start,
        last_layer=gated.stop,
        execution=EXECUTIONS[execution](),
    )
    try:
        yield
    finally:
        attachment.remove()


def add_errors(row: Row, found: Run, wanted: Run) -> None:
    """Keep the worst errors of the row, and where they were."""
    errors = {"loss": (loss_error(found, wanted), ""), "gradient": gradient_error(found, wanted)}
    for what, (error, where) in errors.items():
        if not error <= row.get(f"{what}_error", -1.0):
            row[f"{what}_error"], row[f"{what}_at"] = error, f"{row['at']} {where}".strip()
    row["runs"] = row.get("runs", 0) + 1


def add_failure(row: Row, error: Exception) -> None:
    """Keep the line by which a call was refused, or the error by which it failed."""
    refused = is_refusal(error)
    kind = "refused_calls" if refused else "failed_calls"
    line = str(error) if refused else f"{type(error).__name__}: {error}"[:300]
    row.setdefault(kind, {}).setdefault(line, []).append(row["at"])


def is_refusal(error: Exception) -> bool:
    """Return whether the package itself raised a ValueError, and not torch or the host."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError) and "/regate_ds/" in frames[-1].filename


def add_arguments(parser: ArgumentParser) -> None:
    """Add what every program of this folder takes."""
    parser.add_argument("names", nargs="*", help="of families, also with *; default all")
    parser.add_argument("--rows", type=Path, help="file for the JSON rows")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")


def chosen(names: list[str]) -> list[Family]:
    """Return the families of these names; ValueError for a name that fits none."""
    if not names:
        return list(FAMILIES.values())
    found = {name: [one for one in FAMILIES if fnmatch(one, name)] for name in names}
    for name in [name for name, fits in found.items() if not fits]:
        near = get_close_matches(name, FAMILIES) or ["llama", "llava*"]
        raise ValueError(f"no family is called {name!r}; try {', '.join(near)}")
    return [FAMILIES[one] for fits in found.values() for one in fits]


def rows_of(measure: Callable[[str], Row | None], names: list[str], jobs: int) -> list[Row]:
    """Measure the families of these names, so many at a time, and print each row."""
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        rows = []
        for row in pool.imap(measure, names):
            if row is not None:
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def write_rows(path: Path | None, rows: list[Row]) -> None:
    if path is not None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
