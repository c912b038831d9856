"""A record as the messages that chat templates take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from regate_ds.data.llava.media import ImageSource, Video
from regate_ds.data.llava.records import MARKER, Record

Messages = list[dict[str, Any]]

OWN_TEMPLATE = "set data.template (internvl, llava and qwen2_vl alone)"
"""The way out that only students of these types have."""


def messages_of(record: Record, *, placeholder: str | None = None) -> Messages:
    """Return the record's system text, and its questions and answers in turn.

    placeholder: None makes contents lists of typed parts, as multimodal templates take them; else
        contents are texts, in which it stands for each image and video.
    """
    messages: Messages = []
    sources = iter(record.images)
    if record.system is not None:
        messages.append(_message("system", [record.system], placeholder, sources))
    for turn in record.turns:
        messages.append(_message("user", MARKER.split(turn.question), placeholder, sources))
        messages.append(_message("assistant", [turn.answer], placeholder, sources))
    return messages


def _message(
    role: str, texts: list[str], placeholder: str | None, sources: Iterator[ImageSource]
) -> dict[str, Any]:
    """Return one message, with an image or a video between any two texts."""
    if placeholder is not None:
        return {"role": role, "content": placeholder.join(texts)}
    parts: list[dict[str, str]] = []
    for number, text in enumerate(texts):
        if number:
            parts.append({"type": "video" if isinstance(next(sources), Video) else "image"})
        parts += [{"type": "text", "text": text}] if text else []
    return {"role": role, "content": parts}
