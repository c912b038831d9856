"""A progress bar with a rate, and with the time of day at which the work will end."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

_FORM = (
    "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}s "
    "[{elapsed}<{remaining}, {rate_fmt}, ends {eta:%H:%M}]{postfix}"
)


def progress(total: int, *, desc: str, unit: str, start: int = 0, show: bool = True) -> tqdm:
    """Make a bar from ``start`` to ``total``. With a total in the millions it prints 1.2M."""
    # A log file keeps every line that a terminal would overwrite, so it gets one in ten seconds.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    options: dict[str, Any] = {
        "mininterval": interval,
        "desc": desc,
        "unit": unit,
        "bar_format": _FORM,
    }
    scale = total >= 1_000_000
    return tqdm(total=total, initial=start, unit_scale=scale, disable=not show, **options)
