"""The fields of a record, beside its turns, that other trainers give a meaning."""

from __future__ import annotations

from typing import Any

from regate_ds.data.llava.formats.said import first_said, says_something
from regate_ds.data.llava.records import Cause

REFUSED = {
    "audio": "sound",
    "audios": "sound",
    "channel": "a group to log losses under",
    "chat_template_kwargs": "arguments of a chat template",
    "chosen": "the better of two answers",
    "history": "earlier turns beside the conversation",
    "kto_tag": "a verdict on the answer",
    "label": "a verdict on the answer, or a class",
    "loss": "whether the record is learnt, which belongs into its turns",
    "loss_scale": "a weight of the loss",
    "margin": "how much better an answer is than another",
    "negative_messages": "answers to compare with",
    "objects": "boxes to write into the text",
    "positive_messages": "answers to compare with",
    "rejected": "the worse of two answers",
    "rejected_images": "the worse of two inputs",
    "rejected_messages": "the worse of two answers",
    "rejected_response": "the worse of two answers",
    "weight": "a weight of the loss",
}
"""Fields that other trainers read and this one does not, and what they say."""

OTHER_FORMATS = {
    ("instruction", "output"): "Alpaca's format",
    ("prompt", "completion"): "a prompt with its completion",
    ("query", "response"): "a query with its response",
    ("conversation",): "pairs of turns",
    ("texts",): "pairs of turns",
}
"""The fields by which other formats are known."""


def require_used(raw: dict[str, Any]) -> None:
    """Refuse, by Cause, a record with a field that means something and is not used."""
    if field := first_said(raw, REFUSED):
        raise Cause(
            f"has {field!r} ({REFUSED[field]}), which is not used; take it out, or leave the "
            "record out"
        )


def turns_of(raw: dict[str, Any]) -> list[Any]:
    """Return the record's list of turns. Cause if there is none, or more than one."""
    lists = [field for field in ("conversations", "messages") if says_something(raw.get(field))]
    other = [(fields, name) for fields, name in OTHER_FORMATS.items() if all(map(raw.get, fields))]
    for fields, name in other:
        holds = " and ".join(repr(field) for field in fields)
        if lists:
            raise Cause(f"has both {lists[0]!r} and {holds} ({name}); take one of them out")
        raise Cause(f"has {holds} ({name}), which is not read; write the turns as 'messages'")
    if len(lists) > 1:
        raise Cause("has both 'conversations' and 'messages'; take one of them out")
    parts = raw[lists[0]] if lists else None
    if not isinstance(parts, list):
        raise Cause("has no list 'conversations', nor one 'messages'")
    return parts
