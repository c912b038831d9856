"""One form for refusing the value of a setting."""

from __future__ import annotations


def require(section: object, key: str, holds: bool, problem: str) -> None:
    """Refuse the value of ``section.key``, naming it, unless ``holds``."""
    if not holds:
        raise ValueError(f"{key}={getattr(section, key)!r}: {problem}")
