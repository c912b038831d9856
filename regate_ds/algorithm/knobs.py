"""Judge the plain fields of a frozen dataclass of knobs by the types they are declared with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any


def type_problems(settings: Any) -> list[tuple[str, str]]:
    """Return (name, problem) for each plain field of a wrong type."""
    return [
        (spec.name, _MEANINGS[str(spec.type)][1])
        for spec in fields(settings)
        if spec.type in _MEANINGS and not _MEANINGS[str(spec.type)][0](getattr(settings, spec.name))
    ]


Rule = tuple[str, bool, str]
"""A field's name, whether its value is allowed, and what is allowed."""


def refuse_knobs(settings: Any, rules: Callable[[], list[Rule]] = list) -> None:
    """Refuse, by ValueError naming it, the first knob of a wrong type, or that breaks a rule.

    rules: a function, which is called only if all types are right.
    """
    wrong = type_problems(settings)
    for name, problem in wrong or [(name, text) for name, holds, text in rules() if not holds]:
        raise ValueError(f"{name}={getattr(settings, name)!r}: {problem}")


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not _is_bool(value)


def _is_whole_or_none(value: object) -> bool:
    return value is None or _is_whole(value)


def is_number(value: object) -> bool:
    if not isinstance(value, int | float) or _is_bool(value):
        return False
    # Compared, not converted: a whole number may be larger than any float.
    return abs(value) <= sys.float_info.max


_MEANINGS: dict[str, tuple[Callable[[object], bool], str]] = {
    "bool": (_is_bool, "must be true or false"),
    "int": (_is_whole, "must be a whole number"),
    "int | None": (_is_whole_or_none, "must be a whole number, or null"),
    "float": (is_number, "must be a number"),
}
