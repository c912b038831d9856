"""One thing that `regate doctor` looked at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """``advice`` is empty where nothing is to be done."""

    name: str
    found: str
    is_required: bool
    is_fine: bool
    advice: str = ""
    is_version: bool = False
    """``found`` is a package's version, which is to be the same on all ranks."""
