"""Each format says the same, and a turn says whether it is learnt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from regate_ds.data.llava.records import Record, Turn
from tests.data.formats.formats_helper import draw_media, llava, messages, parse, text, turn


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return draw_media(tmp_path)


FIRST, SECOND = "<image> or <image>\nWhich?", "And <video>?"
IMAGES, CLIP = ["a.png", "b.png"], ["clip"]
A, B = ({"type": "image", "image": name} for name in IMAGES)
BARE, BARE_CLIP = {"type": "image"}, {"type": "video"}
TYPED = [A, text(" or "), B, text("\nWhich?")]
TYPED_CLIP = [text("And "), {"type": "video", "video": "clip"}, text("?")]
LISTS = {"images": IMAGES, "videos": CLIP}
SAME = {
    "llava": llava(FIRST, "It.", SECOND, "No.", system="Look.", image=IMAGES, video="clip"),
    "llava with lists": llava(FIRST, "It.", SECOND, "No.", system="Look.", **LISTS),
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "Look."},
            {"from": "user", "value": FIRST},
            {"from": "assistant", "value": "It."},
            {"from": "human", "value": SECOND},
            {"from": "gpt", "value": "No."},
        ],
        **LISTS,
    },
    "texts": messages(FIRST, "It.", SECOND, "No.", system="Look.", **LISTS),
    "typed": messages(TYPED, [text("It.")], TYPED_CLIP, [text("No.")], system="Look."),
    "typed, without what is in the lists": messages(
        [BARE, text(" or "), BARE | {"index": 1}, text("\nWhich?")],
        "It.",
        [text("And "), BARE_CLIP, text("?")],
        "No.",
        system="Look.",
        **LISTS,
    ),
    "typed, with the nulls of an Arrow table": messages(
        [{"text": None, "image": None, "index": None, **piece} for piece in TYPED],
        "It.",
        TYPED_CLIP,
        "No.",
        conversations=None,
        system="Look.",
        images=None,
        tools=[],
    ),
    "openai": {
        "messages": [
            {"role": "system", "content": [text("Look.")]},
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}},
                    text(" or "),
                    {"type": "image", "path": "b.png"},
                    text("\nWhich?"),
                ],
            },
            {"role": "assistant", "content": "It.", "tool_calls": None},
            {
                "role": "user",
                "content": [
                    text("And "),
                    {"type": "video_url", "video_url": {"url": "clip"}},
                    text("?"),
                ],
            },
            {"role": "assistant", "content": "No."},
        ]
    },
    "conversations with roles": {
        "conversations": messages(FIRST, "It.", SECOND, "No.")["messages"],
        "system": "Look.",
        **LISTS,
    },
}


@pytest.mark.parametrize("name", SAME)
def test_a_conversation_is_the_same_record_in_every_format(name: str, folder: Path):
    record = parse(SAME[name], folder)
    frames = (folder / "clip/1.png", folder / "clip/2.png")
    assert record == Record(
        key=("set", 3),
        id=None,
        images=(folder / "a.png", folder / "b.png", *frames),
        images_per_marker=(1, 1, 2),
        turns=(Turn(FIRST, "It."), Turn(SECOND, "No.")),
        source=folder / "data.json",
        system="Look.",
    )


@pytest.mark.parametrize("fields", [{"system": None}, {"system": ""}, {}])
def test_an_empty_system_text_says_nothing(fields: dict[str, Any]):
    assert parse(llava("q", "a", **fields)).system is None
    assert parse(messages("q", "a", **fields)).system is None


@pytest.mark.parametrize("make", [llava, messages])
@pytest.mark.parametrize(
    ("fields", "learn"),
    [
        ({"loss": False}, False),
        ({"loss": True}, True),
        ({"loss": None}, True),
        ({"weight": 0}, False),
        ({"weight": 1.0}, True),
        ({"train": False}, False),
        ({"loss_mask": 0}, False),
        ({"trainable": False}, False),
        ({"training": True, "weight": 1}, True),
    ],
)
def test_a_turn_says_whether_its_answer_is_learnt(make: Any, fields: dict, learn: bool):
    record = parse(turn(1, make("q", "a", "r", "b"), **fields))
    assert record.turns == (Turn("q", "a", learn=learn), Turn("r", "b"))
    assert parse(turn(0, make("q", "a"), loss=False)).turns == (Turn("q", "a"),)


@pytest.mark.parametrize("make", [llava, messages])
def test_gold_spans_are_read_in_every_format(make: Any):
    record = parse(turn(1, make("q", "a red cat"), gold_spans=[[2, 5]]))
    assert record.turns == (Turn("q", "a red cat", ((2, 5),)),)


def test_fields_without_a_meaning_are_ignored():
    plain = parse(llava("q", "a"))
    more = parse(llava("q", "a", id="x", source="web", scene={"red": 3}, prompt="q"))
    assert replace(more, id=None) == plain
