"""Pick the format of a turn by its fields.

A format is the fields that each of its turns has, and a function that returns what turn ``number``
with the fields ``part`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from regate_ds.data.llava.formats.messages import read_message
from regate_ds.data.llava.formats.said import Said, says_something
from regate_ds.data.llava.formats.sharegpt import read_sharegpt
from regate_ds.data.llava.records import Cause

FORMATS: dict[tuple[str, ...], Callable[[int, Mapping[str, Any]], Said]] = {
    ("from", "value"): read_sharegpt,
    ("role", "content"): read_message,
}


def read_turns(parts: list[Any]) -> list[Said]:
    """Return what each turn says. Cause if one is bad, or in another format than the first."""
    first: tuple[str, ...] | None = None
    turns: list[Said] = []
    for number, part in enumerate(parts):
        if isinstance(part, dict) and says_something(part.get("tool_calls")):
            # A message that calls tools needs no text.
            part = {"content": "", **part}
        fields = _format_of(number, part)
        if first is not None and fields != first:
            raise Cause(f"turn {number} has {_names(fields)} where turn 0 has {_names(first)}")
        first = fields
        turns.append(FORMATS[fields](number, part))
    return turns


def _format_of(number: int, part: Any) -> tuple[str, ...]:
    found = [fields for fields in FORMATS if isinstance(part, dict) and set(fields) <= part.keys()]
    if len(found) > 1:
        # A table has a column for each; what is null says nothing.
        found = [one for one in found if any(part[name] is not None for name in one)] or found[:1]
    if len(found) > 1:
        raise Cause(f"turn {number} has the fields of two formats: {_names(sum(found, ()))}")
    if not found:
        known = ", or ".join(_names(fields) for fields in FORMATS)
        raise Cause(f"turn {number} needs the fields {known}")
    return found[0]


def _names(fields: tuple[str, ...]) -> str:
    return " and ".join(repr(field) for field in fields)
