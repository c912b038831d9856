"""The picture of a task in a round: accuracy over cost, an arm a colour, a length a point."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402 (after the choice of a backend without a screen)

from regate_ds.recipe.learning.files import RunKey  # noqa: E402
from regate_ds.recipe.learning.result import Result  # noqa: E402
from regate_ds.recipe.learning.statistics import standard_error  # noqa: E402
from regate_ds.recipe.learning.table import Costs  # noqa: E402

Point = tuple[float, float, float]
"""Cost as a share of dense at 1, mean accuracy, and its standard error (0 with one seed)."""


def points_of(
    found: Sequence[tuple[RunKey, Result]], dense: str, costs: Costs
) -> dict[str, list[Point]]:
    """Return for each arm its points, from cheap to dear; arms that were not timed are left out.

    dense: the arm whose runs of whole length cost 1.
    """
    runs: dict[tuple[str, float], list[Result]] = defaultdict(list)
    for key, result in found:
        runs[key.arm, key.fraction].append(result)
    whole = [costs.of(one) for one in runs.get((dense, 1.0), [])]
    known = [cost for cost in whole if cost is not None]
    if not known:
        return {}
    points: dict[str, list[Point]] = defaultdict(list)
    for (arm, _), results in runs.items():
        own = [cost for cost in map(costs.of, results) if cost is not None]
        if own:
            values = [one.accuracy_visual for one in results]
            cost = statistics.fmean(own) / statistics.fmean(known)
            points[arm].append((cost, statistics.fmean(values), standard_error(values) or 0.0))
    return {arm: sorted(own) for arm, own in points.items()}


def plot_task(points: dict[str, list[Point]], dense: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8.0, 5.2), dpi=120, layout="constrained")
    for number, (arm, own) in enumerate(points.items()):
        costs, means, errors = zip(*own)
        style = "-o" if len(own) > 1 else "o"
        colour = "black" if arm == dense else f"C{number % 10}"
        axes.errorbar(costs, means, errors, fmt=style, color=colour, markersize=4, linewidth=1)
        axes.annotate(arm, (costs[-1], means[-1]), (4, 3), textcoords="offset points", fontsize=7)
    axes.set_xlabel("cost over dense (CPU seconds by steps, teacher and rankings included)")
    axes.set_ylabel("image words that are right")
    axes.grid(alpha=0.3)
    figure.savefig(path)
    plt.close(figure)
