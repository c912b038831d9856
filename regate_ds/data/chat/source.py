"""The text of a chat template."""

from __future__ import annotations

DAY = "\ufdd0"
"""Stands for the date in a rendered text. Unicode keeps this code out of texts."""

_DATE = "strftime_now"


def dated(source: str) -> str:
    """Return a template that writes ``DAY`` where it would write a date."""
    if _DATE not in source:
        return source
    return f"{{%- macro {_DATE}(form) -%}}{DAY}{{%- endmacro -%}}{source}"


def default_of(source: str | dict[str, str], owner: str) -> str:
    """Return a chat template, or the one named "default" of several. ValueError if none is."""
    if isinstance(source, str):
        return source
    if "default" not in source:
        raise ValueError(
            f"{owner} has the chat templates {sorted(source)}, none of which is 'default'; give "
            "its folder one chat_template.jinja"
        )
    return source["default"]
