"""Turns of OpenAI and Hugging Face: ``{"role": "user", "content": ...}``.

The content is a text, or a list of typed parts: ``{"type": "text", "text": "What is it?"}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from regate_ds.data.llava.formats.said import (
    Medium,
    Said,
    role_of,
    said,
    says_something,
    shortened,
)
from regate_ds.data.llava.formats.tools import RESULT_FIELDS, calls_of, result_of
from regate_ds.data.llava.records import MARKER, Cause

PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "image": ("image", ("image", "path", "url", "base64")),
    "image_url": ("image", ("image_url",)),
    "video": ("video", ("video", "path", "url")),
    "video_url": ("video", ("video_url",)),
}
"""For each type of a part beside "text": its kind, and the fields that may hold it."""


def read_message(number: int, part: Mapping[str, Any]) -> Said:
    """Return turn ``number``. Cause if it is bad."""
    if part["role"] == "tool":
        own = _said_in(number, _without(part, RESULT_FIELDS), "tool")
        return _of_tools(number, own, result_of(number, part, own.text))
    role = role_of(number, part["role"])
    if role != "assistant" or not says_something(part.get("tool_calls")):
        return _said_in(number, part, role)
    own = _said_in(number, _without(part, ("tool_calls",)), role)
    return _of_tools(number, own, calls_of(number, part, own.text))


def _of_tools(number: int, own: Said, message: str) -> Said:
    if own.media or own.gold_spans or MARKER.search(message):
        raise Cause(f"turn {number} shows something or has gold_spans, where tools are used")
    return replace(own, message=message)


def _without(part: Mapping[str, Any], fields: Sequence[str]) -> Mapping[str, Any]:
    rest = {name: value for name, value in part.items() if name not in fields}
    # A message that calls tools needs no text.
    return {**rest, "content": rest.get("content") or ""}


def _said_in(number: int, part: Mapping[str, Any], role: str) -> Said:
    content = part["content"]
    if not isinstance(content, list):
        return said(number, part, role, content)
    texts: list[str] = []
    media: list[Medium] = []
    for piece in content:
        text, medium = _piece(number, piece)
        texts.append(text)
        media += [] if medium is None else [medium]
    return said(number, part, role, "".join(texts), media)


def _piece(number: int, piece: Any) -> tuple[str, Medium | None]:
    """Return the text or marker of one part of a content, and its medium."""
    if not isinstance(piece, dict) or not isinstance(piece.get("type"), str):
        raise Cause(f"turn {number} has a part {shortened(piece)} without a 'type'")
    given = {field: value for field, value in piece.items() if value is not None}
    kind = given.pop("type")
    if kind == "text":
        return _text(number, given), None
    if kind not in PARTS:
        known = ", ".join(repr(each) for each in ("text", *PARTS))
        raise Cause(f"turn {number} has a part of the unknown type {kind!r}; known: {known}")
    kind, fields = PARTS[kind]
    entries = [given.pop(field) for field in fields if field != "base64" and field in given]
    if "base64" in given and "base64" in fields:
        entries.append(f"data:;base64,{given.pop('base64')}")
    index = given.pop("index", None)
    _require_none_left(number, given)
    if len(entries) > 1:
        raise Cause(f"turn {number} has a part that names its {kind} {len(entries)} times")
    return f"<{kind}>", Medium(kind, _unwrapped(number, entries[0]) if entries else None, index)


def _text(number: int, given: dict[str, Any]) -> str:
    text = given.pop("text", None)
    _require_none_left(number, given)
    if not isinstance(text, str):
        raise Cause(f"turn {number} has a part with the text {text!r}")
    if found := MARKER.search(text):
        raise Cause(
            f"turn {number} holds {found.group()} in a text among typed parts; make it a part of "
            "its own"
        )
    return text


def _unwrapped(number: int, entry: Any) -> Any:
    """Return the address within OpenAI's ``{"url": ..., "detail": ...}``, or the entry as it is."""
    if not isinstance(entry, dict) or "url" not in entry:
        return entry
    given = {field: value for field, value in entry.items() if value not in (None, "auto")}
    url = given.pop("url", None)
    _require_none_left(number, given)
    return url


def _require_none_left(number: int, given: dict[str, Any]) -> None:
    for field, value in given.items():
        raise Cause(
            f"turn {number} has a part with {field}={shortened(value)}, which is not used; take it "
            "out"
        )
