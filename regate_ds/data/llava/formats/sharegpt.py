"""Turns of LLaVA and ShareGPT: ``{"from": "human", "value": "<image>\\nWhat is it?"}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regate_ds.data.llava.formats.said import Said, role_of, said


def read_sharegpt(number: int, part: Mapping[str, Any]) -> Said:
    """Return turn ``number``. Cause if it is bad."""
    return said(number, part, role_of(number, part["from"]), part["value"])
