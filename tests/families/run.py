"""Compare the adapter with the oracle in every family: ``python -m tests.families.run [names]``.

For each family a JSON row says whether the class is accepted, how far its worst loss and gradients
are from the oracle's, in ``uses`` how it fared as people train it (``uses.py``), in ``reason`` why
it is refused, and in ``packed_leak`` how much samples of a row see of each other in the
host itself: if that is not 0, such rows must be refused. A name may have a ``*``.
``--execution`` has an oracle of its own for each. The exit code is 1 if an accepted class is wrong,
or a refusal is not a ValueError of one line.
"""

from __future__ import annotations

import argparse
import time
import warnings
from functools import partial
from typing import Any

import transformers

from tests.families.ranks_alone import empty_image, told_apart
from tests.families.refused import reason
from tests.families.rows import (
    TOLERANCE,
    Row,
    add_arguments,
    add_errors,
    add_failure,
    attached,
    chosen,
    is_refusal,
    rows_of,
    write_rows,
)
from tests.families.uses import measure_uses
from tests.families.zoo.cases import Case, cases_of
from tests.families.zoo.compare import ORACLES, attached_run, oracle_run
from tests.families.zoo.fp64 import in_fp64
from tests.families.zoo.leaks import leak_of
from tests.families.zoo.models.family import Family, attentions_of, build
from tests.families.zoo.models.table import FAMILIES

RANGES = (range(0, 4), range(1, 4), range(2, 4), range(1, 3))


def measure(family: Family, execution: str = "elide") -> Row:
    """Return the row of one family."""
    row: Row = {"family": family.name, "class": family.model_class}
    row["execution"] = execution
    start = time.process_time()
    try:
        for attention in attentions_of(family):
            with in_fp64():
                _measure(family, attention, row)
        if row["accepted"]:
            measure_uses(family, row)
    except Exception as error:  # a row of the table, as the run goes on to the next family
        row["error"] = f"{row.pop('at', 'build')}: {type(error).__name__}: {error}"[:500]
    row.pop("at", None)
    return {**row, "cpu_seconds": round(time.process_time() - start, 1)}


def _measure(family: Family, attention: str, row: Row) -> None:
    row["at"] = "build"
    model = build(family, attention)
    row["decoder"] = model.config.get_text_config(decoder=True).model_type
    row["at"] = "cases"
    cases = cases_of(family, model)
    if not _accepts(model, row):
        row["at"] = "reason"
        if row["execution"] == "elide" and "reason" not in row:
            row["reason"] = reason(model, cases, row["refusal"])
        return
    row["images"] = family.make_images is not None
    if row["images"]:
        row["at"] = "empty image"
        row["empty_image"] = empty_image(model, cases)
        row["at"] = "told apart"
        row["told_apart"] = told_apart(model, cases)
    row["at"] = "leak"
    row["packed_leak"] = _leaks(family, model, cases)
    for gated in RANGES:
        for case in cases:
            for name, plan in case.plans():
                if gated == RANGES[0] or name != "all kept":
                    row["at"] = f"{attention}, {case.name}, {name}, [{gated.start}, {gated.stop})"
                    _compare(model, case, plan, gated, row)


def _leaks(family: Family, model: Any, cases: list[Case]) -> dict[str, float]:
    """Return by packed case how much its samples see of each other in the host."""
    masked = not family.settings.get("mask_never", False)
    packed = [one for one in cases if one.name.startswith("packed")]
    return {one.name: leak_of(model, one, masked=masked) for one in packed}


def _accepts(model: Any, row: Row) -> bool:
    """Say in the row whether the adapter takes the class."""
    row["at"] = "attach"
    try:
        with attached(model, RANGES[0], row["execution"]):
            pass
    except ValueError as error:
        if not is_refusal(error):
            raise
        row.setdefault("accepted", False)
        row["refusal"] = str(error)
        return False
    row["accepted"] = True
    return True


def _compare(model: Any, case: Case, plan: Any, gated: range, row: Row) -> None:
    """Add one comparison to the row, or the line by which the call was refused."""
    plan = case.plan_of(row["execution"], plan, gated)
    try:
        with attached(model, gated, row["execution"]):
            found = attached_run(model, case.inputs, plan)
    except Exception as error:  # part of the row, as the run goes on
        add_failure(row, error)
        return
    add_errors(row, found, oracle_run(model, case.inputs, plan, gated, row["execution"]))


def verdict(row: Row) -> str:
    """Return what a row comes to, in a word or two."""
    refusals = [row.get("refusal", ""), *row.get("refused_calls", {})]
    if any("\n" in line for line in refusals):
        return "wrong refusal"
    if "error" in row:
        return "not built" if row["error"].startswith("build:") else "failed"
    if "failed_calls" in row:
        return "failed"
    if not row["accepted"]:
        return "refused"
    if "runs" not in row:
        return "refused in each call"
    worst = (row["loss_error"], row["gradient_error"])
    is_exact = all(error <= TOLERANCE for error in worst) and not _leaks_unrefused(row)
    return "exact" if is_exact else "wrong"


def _leaks_unrefused(row: Row) -> list[str]:
    """Return the packed cases whose samples see each other in the host, but which were taken."""
    refused = [at.split(", ")[1] for calls in row.get("refused_calls", {}).values() for at in calls]
    leaks = [name for name, leak in row["packed_leak"].items() if not leak <= TOLERANCE]
    return [name for name in leaks if name not in refused]


def judged(name: str, execution: str) -> Row:
    """Return the row of a family with its verdict."""
    row = measure(FAMILIES[name], execution)
    return {**row, "verdict": verdict(row)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--execution", choices=ORACLES, default="elide")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    try:
        names = [family.name for family in chosen(arguments.names)]
    except ValueError as error:
        parser.error(str(error))
    judge = partial(judged, execution=arguments.execution)
    rows = rows_of(judge, names, arguments.jobs)
    write_rows(arguments.rows, rows)
    return _summary(rows)


def _summary(rows: list[Row]) -> int:
    """Print the families of each verdict; return the exit code."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row["verdict"], []).append(row["family"])
    for name, families in sorted(found.items()):
        print(f"{len(families)} {name}: {', '.join(families)}")
    return int(bool(found.keys() & {"wrong", "wrong refusal", "failed"}))


if __name__ == "__main__":
    raise SystemExit(main())
