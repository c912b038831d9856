"""A record as the messages that chat templates take."""

from __future__ import annotations

from typing import Any

from regate_ds.data.llava.media import VideoFrame
from regate_ds.data.llava.records import MARKER, Record, bad_record, describe

Messages = list[dict[str, Any]]

OWN_TEMPLATE = "set data.template (internvl, llava and qwen2_vl alone)"
"""The way out that only students of these types have."""


def messages_of(record: Record, *, placeholder: str | None = None) -> Messages:
    """Return the record's system text, and its questions and answers in turn.

    placeholder: None makes contents lists of typed parts, as multimodal templates take them; else
        contents are texts, in which it stands for each image.

    SampleError if the record has a video.
    """
    _require_no_video(record)
    messages: Messages = []
    if record.system is not None:
        messages.append(_message("system", [record.system], placeholder))
    for turn in record.turns:
        messages.append(_message("user", MARKER.split(turn.question), placeholder))
        messages.append(_message("assistant", [turn.answer], placeholder))
    return messages


def _message(role: str, texts: list[str], placeholder: str | None) -> dict[str, Any]:
    """Return one message, with an image between any two texts."""
    if placeholder is not None:
        return {"role": role, "content": placeholder.join(texts)}
    parts: list[dict[str, str]] = []
    for number, text in enumerate(texts):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    return {"role": role, "content": parts}


def _require_no_video(record: Record) -> None:
    is_clip = any(isinstance(source, VideoFrame) for source in record.images)
    is_named = any("<video>" in turn.question for turn in record.turns)
    if is_clip or is_named or any(count != 1 for count in record.images_per_marker):
        cause = (
            "has a video, which is not written by the model's chat template yet; give it as "
            f"images, or {OWN_TEMPLATE} to encode its frames as images"
        )
        raise bad_record(describe(record, cause))
