"""Print the figures of a run."""

from __future__ import annotations

from typing import Any

from regate_ds.job.ranks import is_first_rank


def print_figures(figures: dict[str, Any]) -> None:
    """Print one line for each figure, on the first rank only."""
    if not is_first_rank():
        return
    for name, value in figures.items():
        text = f"{value:.4f}" if isinstance(value, float) else value
        print(f"{name:<26}{'-' if text is None else text}")
