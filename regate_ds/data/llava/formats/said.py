"""One turn as its file says it, whatever the format; and the fields that all formats share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regate_ds.data.llava.records import Cause

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""The words of the formats for who speaks."""

LEARN_FIELDS = ("loss", "loss_mask", "weight", "train", "trainable", "training")
"""Fields of a turn that say whether its answer is learnt."""

REFUSED_OF_TURN = {
    "audio": "sound",
    "function_call": "a tool's call",
    "image": "an image of one turn, which belongs into the record's 'images'",
    "images": "images of one turn, which belong into the record's 'images'",
    "loss_scale": "a weight of its loss",
    "loss_weight": "a weight of its loss",
    "name": "a name of the speaker",
    "reasoning": "a train of thought beside the answer",
    "reasoning_content": "a train of thought beside the answer",
    "refusal": "an answer that refuses",
    "thinking": "a train of thought beside the answer",
    "tool_call_id": "a tool's result",
    "tool_calls": "calls of tools",
    "train_detail": "parts of the answer to learn",
    "training_detail": "parts of the answer to learn",
    "videos": "videos of one turn, which belong into the record's 'videos'",
}
"""Fields of a turn that other trainers read and this one does not, and what they say."""

_SURROGATE = re.compile("[\ud800-\udfff]")
"""Finds half a character: JSON can write it ("\\ud83d"), tokenizers and terminals refuse it."""

_TAGGED = re.compile(r"<(img|video|audio|image)>[^<>]*</\1>")
"""Finds a medium that is written into the text itself."""


@dataclass(frozen=True)
class Medium:
    """An image or a video that a turn's content names, or only gives a place."""

    kind: str
    """"image" or "video"."""

    entry: Any = None
    """What stands for it; None: it is the next of the record's own list."""

    index: int | None = None
    """Its number in the record's own list, where the content says so."""


@dataclass(frozen=True)
class Said:
    """What one turn says."""

    role: str
    """"system", "user", "assistant" or "tool"."""

    text: str
    """With ``<image>`` and ``<video>`` in it."""

    media: tuple[Medium, ...] = ()
    """Those that the content lists, in order."""

    learn: bool = True
    gold_spans: tuple[tuple[int, int], ...] = ()

    message: str | None = None
    """The turn as JSON, if it calls tools or is from one."""


def role_of(number: int, called: Any) -> str:
    """Return who speaks in turn ``number``. Cause if the word is not known."""
    if not isinstance(called, str) or called not in ROLES:
        known = ", ".join(repr(word) for word in ROLES)
        raise Cause(f"turn {number} has the unknown role {called!r}; known: {known}")
    return ROLES[called]


def said(number: int, part: Mapping[str, Any], role: str, text: Any, media: Any = ()) -> Said:
    """Return the checked turn ``number``. part: its fields, for those that all formats share."""
    if field := first_said(part, REFUSED_OF_TURN):
        meaning = REFUSED_OF_TURN[field]
        raise Cause(f"turn {number} has {field!r} ({meaning}), which is not used; take it out")
    if not isinstance(text, str):
        raise Cause(f"turn {number} has the value {shortened(text)}, not a text")
    require_plain(f"turn {number}", text)
    gold_spans = _gold(number, part, text) if role == "assistant" else ()
    return Said(role, text, tuple(media), _learns(number, part, role), gold_spans)


def require_plain(where: str, text: str) -> None:
    """Refuse, by Cause, a text with half of a character, or with the name of a file in tags."""
    if found := _SURROGATE.search(text):
        raise Cause(f"{where} holds {found.group()!r}, half of a character")
    if found := _TAGGED.search(text):
        raise Cause(_within(where, found))


def first_said(given: Mapping[str, Any], refused: Mapping[str, str]) -> str | None:
    """Return the first of these fields that a record or turn says something in."""
    found = given.keys() & refused.keys()
    return min((field for field in found if says_something(given[field])), default=None)


def says_something(value: Any) -> bool:
    """Return whether a field holds more than null or an empty text, list or object."""
    return value is not None and not (isinstance(value, (str, list, dict)) and not value)


def shortened(value: Any) -> str:
    """Return a value as Python writes it, for messages."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _within(where: str, found: re.Match[str]) -> str:
    kind = "image" if found.group(1) == "img" else found.group(1)
    if kind == "audio":
        return f"{where} holds {found.group()!r}; sound is not used, leave the record out"
    return (
        f"{where} holds {found.group()!r}, which would be learnt as text; write <{kind}> in "
        f"its place and name the file in '{kind}s'"
    )


def _learns(number: int, part: Mapping[str, Any], role: str) -> bool:
    """Return whether a turn's answer is learnt, which is so if no field says otherwise."""
    if part.keys().isdisjoint(LEARN_FIELDS):
        return True
    given = {field: part[field] for field in LEARN_FIELDS if part.get(field) is not None}
    for field, value in given.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise Cause(
                f"turn {number} has {field}={value!r}; an answer is learnt (1, true) or not (0, "
                "false), with no weight between"
            )
        if value and role != "assistant":
            raise Cause(f"turn {number} has {field}={value!r}, but only answers are learnt")
    if len({bool(value) for value in given.values()}) > 1:
        raise Cause(f"turn {number} is both learnt and not: {given}")
    return all(given.values())


def _gold(number: int, part: Mapping[str, Any], text: str) -> tuple[tuple[int, int], ...]:
    spans = part.get("gold_spans")
    if spans is None:
        return ()
    if not isinstance(spans, list) or not all(_is_span(span, len(text)) for span in spans):
        raise Cause(
            f"turn {number} has the gold_spans {spans!r}; expected [start, end) pairs within its "
            f"{len(text)} characters"
        )
    return tuple((start, end) for start, end in spans)


def _is_span(span: Any, length: int) -> bool:
    if not isinstance(span, list) or len(span) != 2 or not all(type(x) is int for x in span):
        return False
    return 0 <= span[0] < span[1] <= length
