"""`regate bench step [CONFIG] [key=value ...]`: what a step costs beside its baselines.

Each row is an arm. All arms take turns in one run (A B A B ...), in CPU seconds on a CPU, of the
slowest rank where there are several, and in seconds between events on a GPU. Ratios are medians
over turns of an arm's time to a baseline's in the same turn; they hold for one run on one machine.
"""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from regate_ds.recipe.bench.arms import ARMS
from regate_ds.recipe.bench.case import StepCase, read_case
from regate_ds.recipe.bench.ranks import run_ranks_of
from regate_ds.recipe.bench.table import step_rows, step_table
from regate_ds.settings.section import plain_values


def main(argv: Sequence[str]) -> None:
    """Run the benchmark, print a table, and write JSON if asked."""
    parser = ArgumentParser(
        prog="regate bench step",
        description=__doc__,
        epilog=_epilog(),
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("arguments", nargs="*", metavar="CONFIG | key=value")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    args = parser.parse_args(argv)
    path, overrides = _split(args.arguments)
    result = run_case(read_case(path, overrides))
    if os.environ.get("RANK", "0") != "0":
        return
    print(step_table(result))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def run_case(case: StepCase) -> dict[str, Any]:
    """Return the case, the machine, and a row of figures for each arm."""
    measured, machine = run_ranks_of(case)
    return {"case": plain_values(case), "machine": machine, "rows": step_rows(case, measured)}


def _split(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Take the configuration, if the first argument is one, from the overrides."""
    if arguments and "=" not in arguments[0]:
        return Path(arguments[0]), list(arguments[1:])
    return None, list(arguments)


def _epilog() -> str:
    keys = "\n".join(f"  {spec.name}={spec.default}" for spec in fields(StepCase))
    rows = "\n".join(f"  {name}: {arm.about}" for name, arm in ARMS.items())
    return f"keys, with their defaults:\n{keys}\n\nrows:\n{rows}"
