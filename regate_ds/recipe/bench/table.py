"""The figures of `regate bench step`: ratios of what the ranks measured, as rows and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from regate_ds.recipe.bench.arms import ARMS, DENSE, HOST
from regate_ds.recipe.bench.case import StepCase
from regate_ds.recipe.bench.timing import Measured


def step_rows(case: StepCase, found: Sequence[dict[str, Measured]]) -> dict[str, dict[str, Any]]:
    """Return each arm's figures: times of the slowest rank, bytes summed over ranks."""
    seconds = {name: _slowest([rank[name].seconds for rank in found]) for name in found[0]}
    rows = {name: _row(case, [rank[name] for rank in found]) for name in found[0]}
    dense = rows[DENSE]
    for name, row in rows.items():
        own = seconds[name]
        row |= {
            "seconds": statistics.median(own),
            "spread": (max(own) - min(own)) / statistics.median(own),
            "of_host": _ratio(own, seconds[HOST]),
            "of_dense": _ratio(own, seconds[DENSE]),
            "ideal": row["flops"] / dense["flops"],
            "ideal_causal": row["flops_causal"] / dense["flops_causal"],
        }
        row["over_ideal"] = row["of_dense"] / row["ideal"]
        if row["saved_bytes"] is not None and dense["saved_bytes"]:
            row["saved_of_dense"] = row["saved_bytes"] / dense["saved_bytes"]
            row["saved_over_share"] = row["saved_of_dense"] / row["share_of_rows"]
    return rows


def _row(case: StepCase, ranks: Sequence[Measured]) -> dict[str, Any]:
    tokens = case.samples * case.tokens * case.micro_batches
    first = ranks[0]
    saved = [one.saved_bytes for one in ranks if one.saved_bytes is not None]
    overhead = max(statistics.median(one.overhead) for one in ranks) if first.overhead else None
    return {
        "flops": first.flops,
        "flops_causal": first.flops_causal,
        "share_of_rows": first.share_of_rows,
        "plan_ms_per_8k_tokens": None if overhead is None else 1000 * overhead * 8192 / tokens,
        "saved_bytes": sum(saved) if saved else None,
        "peak_bytes": max(one.peak_bytes for one in ranks),
        "sent_bytes": sum(one.sent_bytes for one in ranks),
        "collective_bytes": sum(one.collective_bytes for one in ranks),
        "waits": max(one.waits for one in ranks),
        "waits_at_end": max(one.waits_at_end for one in ranks),
    }


def _slowest(ranks: Sequence[Sequence[float]]) -> list[float]:
    return [max(turn) for turn in zip(*ranks, strict=True)]


def _ratio(own: Sequence[float], other: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(own, other, strict=True))


_COLUMNS = (
    ("s", "seconds", 1.0),
    ("spread", "spread", 1.0),
    ("of host", "of_host", 1.0),
    ("of dense", "of_dense", 1.0),
    ("ideal", "ideal", 1.0),
    ("over", "over_ideal", 1.0),
    ("plan ms", "plan_ms_per_8k_tokens", 1.0),
    ("saved MB", "saved_bytes", 1e6),
    ("/share", "saved_over_share", 1.0),
    ("peak MB", "peak_bytes", 1e6),
    ("p2p MB", "sent_bytes", 1e6),
    ("coll. MB", "collective_bytes", 1e6),
)


def step_table(result: dict[str, Any]) -> str:
    """Return the table of ``run_case``'s result."""
    rows, machine = result["rows"], result["machine"]
    heads = "".join(f"{head:>9}" for head, *_ in _COLUMNS)
    lines = [f"{'arm':<23}{heads}{'waits':>8}"]
    for name, row in rows.items():
        cells = "".join(f"{_shown(row.get(key), unit):>9}" for _, key, unit in _COLUMNS)
        waits = f"{row['waits']}+{row['waits_at_end']}"
        lines.append(f"{name:<23}{cells}{waits:>8}")
    lines += [f"{name}: {ARMS[name].about}" for name in rows]
    clock = "CPU seconds" if machine["clock"] == "CPU" else "seconds between events"
    return "\n".join([*lines, f"{clock}, {machine['device']}, torch {machine['torch']}"])


def _shown(value: Any, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.3f}"
