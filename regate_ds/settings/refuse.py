"""The one form in which a setting's value is refused."""

from __future__ import annotations


def require(section: object, key: str, holds: bool, problem: str) -> None:
    """Raise ValueError, naming ``section.key`` and its value, unless ``holds`` is true.

    problem: what the value must be, or needs; it ends the message.
    """
    if not holds:
        raise ValueError(f"{key}={getattr(section, key)!r}: {problem}")
