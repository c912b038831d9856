"""What the commands `regate train`, `regate teacher` and `regate eval` do."""

from __future__ import annotations

from typing import Any

from regate_ds.job.ranks import _is_first


def _print_on_first(figures: dict[str, Any]) -> dict[str, Any]:
    if _is_first():
        for name, value in figures.items():
            text = f"{value:.4f}" if isinstance(value, float) else value
            print(f"{name:<26}{'-' if text is None else text}")
    return figures
