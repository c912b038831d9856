"""What an elided run cost, as a share of the dense run, and the arithmetic behind it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from regate_ds.recipe.run_folder import RunFolder


def cost_line(dense: RunFolder, elided: RunFolder) -> str:
    """Return one line: the ratio of the runs' train CPU seconds, and what it is made of.

    The sum is that of the elided run's own steps: its share of dense steps, and the other steps at
    the ratio of a median sparse step to a median dense one.
    """
    ours, theirs = elided.summary()["train_cpu_seconds"], dense.summary()["train_cpu_seconds"]
    found = f"{elided.name} took {ours / theirs:.2f} of {dense.name}'s train CPU seconds"
    rows = elided.metrics()
    dense_seconds, sparse_seconds = _cpu_seconds(rows, dense=True), _cpu_seconds(rows, dense=False)
    if not dense_seconds or not sparse_seconds:
        return found
    share = len(dense_seconds) / len(rows)
    ratio = statistics.median(sparse_seconds) / statistics.median(dense_seconds)
    return (
        f"{found}; by its own steps {share:.2f} + {1 - share:.2f} x {ratio:.2f} = "
        f"{share + (1 - share) * ratio:.2f}: {share:.2f} of them were dense, and a sparse one took "
        f"{ratio:.2f} of a dense one"
    )


def _cpu_seconds(rows: Sequence[Mapping[str, Any]], *, dense: bool) -> list[float]:
    return [row["cpu_seconds"] for row in rows if row["dense"] is dense]
