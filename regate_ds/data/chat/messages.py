"""A record as the messages that chat templates take."""

from __future__ import annotations

import json
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
        if turn.results:
            messages += [_of_tool(result, placeholder) for result in turn.results]
        else:
            messages.append(_message("user", MARKER.split(turn.question), placeholder, sources))
        if turn.calls is not None:
            messages.append(_of_tool(turn.calls, placeholder))
        else:
            messages.append(_message("assistant", [turn.answer], placeholder, sources))
    return messages


def answers_in(messages: Messages, *, calls: bool = False) -> list[int]:
    """Return the places of the answers. calls: of those alone that call tools."""
    return [
        place
        for place, message in enumerate(messages)
        if message["role"] == "assistant" and (not calls or "tool_calls" in message)
    ]


def _of_tool(message: str, placeholder: str | None) -> dict[str, Any]:
    """Return a tool's result, or a call of tools."""
    read = json.loads(message)
    if placeholder is None:
        read["content"] = [{"type": "text", "text": read["content"]}] if read["content"] else []
    return read


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
