"""Keys of older files: they are read where they stand now, with one line that says so."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

_log = logging.getLogger(__name__)


def moved_keys(values: Mapping[str, Any], moved: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return the values with each older key under its new, dotted name.

    ValueError if both are given, or if the new one's section is no section.
    """
    result = {key: value for key, value in values.items() if key not in moved}
    prefix = f"{where}." if where else ""
    for key in (key for key in values if key in moved):
        section, _, name = moved[key].partition(".")
        inner = result.get(section)
        if inner is not None and not isinstance(inner, Mapping):
            raise ValueError(
                f"{prefix}{section}={inner!r}: must hold keys; write {prefix}{key} there, as {name}"
            )
        inner = dict(inner or {})
        if name in inner:
            raise ValueError(
                f"{prefix}{key}={values[key]!r}: {prefix}{moved[key]}={inner[name]!r} is given as "
                f"well; leave {prefix}{key} out"
            )
        result[section] = {**inner, name: values[key]}
        _log.warning("%s%s is written %s%s now", prefix, key, prefix, moved[key])
    return result
