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
    "documents": "texts to answer from, for a chat template",
    "functions": "tools, which belong into 'tools'",
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
    "system_message": "a system text, which belongs into 'system'",
    "system_prompt": "a system text, which belongs into 'system'",
    "video_end": "where to cut the video",
    "video_start": "where to cut the video",
    "weight": "a weight of the loss",
}
"""Fields that other trainers read and this one does not, and what they say."""

OTHER_NAMES = {
    **dict.fromkeys(("img", "imgs", "img_path", "image_file", "image_files"), "image"),
    **dict.fromkeys(("image_path", "image_paths", "image_url", "image_urls"), "image"),
    **dict.fromkeys(("video_file", "video_files", "video_path", "video_paths"), "video"),
    **dict.fromkeys(("video_url", "video_urls"), "video"),
}
"""Names under which a record of another tool may hold its images or videos."""

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


def require_text_alone(raw: dict[str, Any]) -> None:
    """Refuse, by Cause, a record that shows nothing, but names an image or a video elsewhere."""
    if field := first_said(raw, OTHER_NAMES):
        kind = OTHER_NAMES[field]
        raise Cause(
            f"has {field!r}, but {kind}s are read from '{kind}' and '{kind}s' alone; name the file "
            "there, or take the field out"
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
