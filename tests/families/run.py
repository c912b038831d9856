"""Compare the adapter with the oracle in every family: ``python -m tests.families.run [names]``.

For each family a JSON row says whether the class is accepted, how far its worst loss and gradients
are from the oracle's, and in ``packed_leak`` how much samples of a row see of each other in the
host itself: if that is not 0, the adapter must refuse packed rows. A name may have a ``*``.
``--execution`` has an oracle of its own for each. The exit code is 1 if an accepted class is wrong,
or a refusal is not a ValueError of one line.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import transformers

from regate_ds.algorithm.executions.table import EXECUTIONS
from tests.families.ranks_alone import empty_image, told_apart
from tests.families.zoo.cases import Case, cases_of
from tests.families.zoo.compare import (
    ORACLES,
    attached_run,
    gradient_error,
    loss_error,
    oracle_run,
)
from tests.families.zoo.fp64 import in_fp64
from tests.families.zoo.leaks import leak_of
from tests.families.zoo.models.family import Family, attentions_of, build
from tests.families.zoo.models.table import FAMILIES
from tests.support.planning import gate_layers

TOLERANCE = 1e-10
RANGES = (range(0, 4), range(1, 4), range(2, 4), range(1, 3))


def measure(family: Family, execution: str = "elide") -> dict[str, Any]:
    """Return the row of one family."""
    row: dict[str, Any] = {"family": family.name, "class": family.model_class}
    row["execution"] = execution
    start = time.perf_counter()
    try:
        for attention in attentions_of(family):
            with in_fp64():
                _measure(family, attention, row)
    except Exception as error:  # a row of the table, as the run goes on to the next family
        row["error"] = f"{row.pop('at', 'build')}: {type(error).__name__}: {error}"[:500]
    row.pop("at", None)
    return {**row, "seconds": round(time.perf_counter() - start, 1)}


def _measure(family: Family, attention: str, row: dict[str, Any]) -> None:
    row["at"] = "build"
    model = build(family, attention)
    row["decoder"] = model.config.get_text_config(decoder=True).model_type
    row["at"] = "cases"
    cases = cases_of(family, model)
    if not _accepts(model, row):
        return
    row["images"] = family.make_images is not None
    if row["images"]:
        row["at"] = "empty image"
        row["empty_image"] = empty_image(model, cases)
        row["at"] = "told apart"
        row["told_apart"] = told_apart(model, cases)
    row["at"] = "leak"
    row["packed_leak"] = max([leak_of(model, one) for one in cases if one.name == "packed"] or [0])
    for gated in RANGES:
        for case in cases:
            for name, plan in case.plans():
                if gated == RANGES[0] or name != "all kept":
                    row["at"] = f"{attention}, {case.name}, {name}, [{gated.start}, {gated.stop})"
                    _compare(model, case, plan, gated, row)


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


def _accepts(model: Any, row: dict[str, Any]) -> bool:
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


def _compare(model: Any, case: Case, plan: Any, gated: range, row: dict[str, Any]) -> None:
    """Add one comparison to the row, or the line by which the call was refused."""
    plan = case.plan_of(row["execution"], plan, gated)
    try:
        with attached(model, gated, row["execution"]):
            found = attached_run(model, case.inputs, plan)
    except Exception as error:  # part of the row, as the run goes on
        kind = "refused_calls" if is_refusal(error) else "failed_calls"
        row.setdefault(kind, {}).setdefault(_line(error, kind), []).append(row["at"])
        return
    wanted = oracle_run(model, case.inputs, plan, gated, row["execution"])
    errors = {"loss": (loss_error(found, wanted), ""), "gradient": gradient_error(found, wanted)}
    for what, (error, where) in errors.items():
        if not error <= row.get(f"{what}_error", -1.0):
            row[f"{what}_error"], row[f"{what}_at"] = error, f"{row['at']} {where}".strip()
    row["runs"] = row.get("runs", 0) + 1


def is_refusal(error: Exception) -> bool:
    """Return whether the package itself raised a ValueError, and not torch or the host."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError) and "/regate_ds/" in frames[-1].filename


def _line(error: Exception, kind: str) -> str:
    return str(error) if kind == "refused_calls" else f"{type(error).__name__}: {error}"[:300]


def verdict(row: dict[str, Any]) -> str:
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
    return "exact" if all(error <= TOLERANCE for error in worst) else "wrong"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="of families, also with *; default all")
    parser.add_argument("--execution", choices=ORACLES, default="elide")
    parser.add_argument("--rows", type=Path, help="file for the JSON rows")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    try:
        families = chosen(arguments.names)
    except ValueError as error:
        parser.error(str(error))
    for family in families:
        row = measure(family, arguments.execution)
        rows.append({**row, "verdict": verdict(row)})
        print(json.dumps(rows[-1]), flush=True)
    if arguments.rows:
        arguments.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return _summary(rows)


def chosen(names: list[str]) -> list[Family]:
    """Return the families of these names; ValueError for a name that fits none."""
    if not names:
        return list(FAMILIES.values())
    found = {name: [one for one in FAMILIES if fnmatch(one, name)] for name in names}
    for name in [name for name, fits in found.items() if not fits]:
        near = get_close_matches(name, FAMILIES) or ["llama", "llava*"]
        raise ValueError(f"no family is called {name!r}; try {', '.join(near)}")
    return [FAMILIES[one] for fits in found.values() for one in fits]


def _summary(rows: list[dict[str, Any]]) -> int:
    """Print the families of each verdict; return the exit code."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row["verdict"], []).append(row["family"])
    for name, families in sorted(found.items()):
        print(f"{len(families)} {name}: {', '.join(families)}")
    return int(bool(found.keys() & {"wrong", "wrong refusal", "failed"}))


if __name__ == "__main__":
    raise SystemExit(main())
