"""The record of one check of `regate doctor`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """What one check found; ``advice`` is empty where nothing has to be done."""

    name: str
    found: str
    is_required: bool
    is_fine: bool
    advice: str = ""
    is_version: bool = False
    """True if ``found`` is a package's version, which must be the same on all ranks."""
