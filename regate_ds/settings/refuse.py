"""The one form in which a setting's value is refused."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any


def require(section: object, key: str, holds: bool, problem: str) -> None:
    """Raise ValueError, naming ``section.key`` and its value, unless ``holds`` is true.

    problem: what the value must be, or needs; it ends the message.
    """
    if not holds:
        raise ValueError(f"{key}={getattr(section, key)!r}: {problem}")


def refuse_choices(section: Any, kinds: Mapping[str, tuple[type[Any], ...]]) -> None:
    """Refuse, by ValueError naming it, a field whose value is of none of its kinds."""
    for name, allowed in kinds.items():
        if not isinstance(value := getattr(section, name), allowed):
            raise ValueError(f"{name}={value!r}: must be {_one_of(allowed)}")


def _one_of(kinds: tuple[type[Any], ...]) -> str:
    named = [kind for kind in kinds if kind is not NoneType]
    if len(named) == 1:
        name = named[0].__name__
        article = "an" if name[0] in "AEIOU" else "a"
        return f"{article} {name}{', or None' * (NoneType in kinds)}; write {name}(...)"
    package = named[0].__module__.rpartition(".")[0]
    names = ", ".join(kind.__name__ for kind in named)
    return f"one of {names}; write {named[0].__name__}(...), from {package}'s modules"
