"""Every record that would be misread is refused in one line, which says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from regate_ds.data.llava.formats.fields import OTHER_FORMATS, OTHER_NAMES, REFUSED
from regate_ds.data.llava.formats.said import REFUSED_OF_TURN
from tests.data.formats.formats_helper import cause, draw_media, llava, messages, parse, text, turn
from tests.support.paths import ROOT

A, BARE = {"type": "image", "image": "a.png"}, {"type": "image"}
PAGE = (ROOT / "docs" / "data_formats.md").read_text()
LATER = "; take it out, or leave the record out"


def user(*pieces: Any) -> dict[str, Any]:
    return messages(list(pieces), "a")


REFUSALS = [
    (
        llava("q", "a", messages=messages("q", "a")["messages"]),
        "has both 'conversations' and 'messages'; take one of them out",
    ),
    (
        {"id": 3},
        "has no list 'conversations', nor one 'messages'",
    ),
    (
        {"instruction": "q", "output": "a"},
        "has 'instruction' and 'output' (Alpaca's format), which is not read; write the"
        " turns as 'messages'",
    ),
    (
        messages("q", "a", query="q", response="a"),
        "has both 'messages' and 'query' and 'response' (a query with its response); "
        "take one of them out",
    ),
    (
        {"messages": [{"role": "user", "content": "q", "from": "human", "value": "q"}]},
        "turn 0 has the fields of two formats: 'from' and 'value' and 'role' and 'content'",
    ),
    (
        {"messages": [{"role": "user", "content": "q"}, {"from": "gpt", "value": "a"}]},
        "turn 1 has 'from' and 'value' where turn 0 has 'role' and 'content'",
    ),
    (
        {"messages": [{"role": "user"}]},
        "turn 0 needs the fields 'from' and 'value', or 'role' and 'content'",
    ),
    (
        {"messages": [{"role": "tool", "content": "q"}]},
        "turn 0 is from the tool where the user should speak",
    ),
    (
        llava("q", "a", extra=1) | {"conversations": [{"from": "tool", "value": "q"}]},
        "turn 0 has the unknown role 'tool'; known: 'human', 'user', 'gpt', 'assistant', 'system'",
    ),
    (
        llava("q", "a", system="\ud83d"),
        "its system text holds '\\ud83d', half of a character",
    ),
    (
        llava("q", "a", system="<img>a.png</img>"),
        "its system text holds '<img>a.png</img>', which would be learnt as text; write <image> in "
        "its place and name the file in 'images'",
    ),
    (
        llava("q", "a", system=3),
        "has the system 3, not a text",
    ),
    (
        {"messages": [{"role": "system", "content": "x"}], "system": "Be."},
        "has both 'system' and a system turn; take one of them out",
    ),
    (
        llava("q", "a", system="See <image>"),
        "has a system text that holds <image>",
    ),
    (
        {"messages": [*messages("q", "a")["messages"], {"role": "system", "content": "x"}]},
        "turn 2 is from the system where the user should speak",
    ),
    (
        {"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "a"}]},
        "turn 1 is from the assistant where the user should speak",
    ),
    (
        {"messages": [{"role": "system", "content": "x"}]},
        "its 0 turns do not pair up: every question needs an answer after it",
    ),
    (
        messages("q", "a", "r"),
        "its 3 turns do not pair up: every question needs an answer after it",
    ),
    (
        turn(1, llava("q", "a"), loss=False),
        "has no answer to learn: all of its turns say so",
    ),
    (
        turn(1, llava("q", "a"), weight=0.5),
        "turn 1 has weight=0.5; an answer is learnt (1, true) or not (0, false), with "
        "no weight between",
    ),
    (
        turn(1, llava("q", "a"), loss="no"),
        "turn 1 has loss='no'; an answer is learnt (1, true) or not (0, false), with no"
        " weight between",
    ),
    (
        turn(1, llava("q", "a"), loss=False, weight=1),
        "turn 1 is both learnt and not: {'loss': False, 'weight': 1}",
    ),
    (
        turn(0, llava("q", "a"), weight=1),
        "turn 0 has weight=1, but only answers are learnt",
    ),
    (
        llava("Picture 1: <img>a.png</img>\nq", "a"),
        "turn 0 holds '<img>a.png</img>', which would be learnt as text; write <image> "
        "in its place and name the file in 'images'",
    ),
    (
        messages("<video>a.mp4</video>q", "a"),
        "turn 0 holds '<video>a.mp4</video>', which would be learnt as text; write "
        "<video> in its place and name the file in 'videos'",
    ),
    (
        messages("<audio>a.wav</audio>q", "a"),
        "turn 0 holds '<audio>a.wav</audio>'; sound is not used, leave the record out",
    ),
    (
        messages("q", None),
        "turn 1 has the value None, not a text",
    ),
    (
        user("q"),
        "turn 0 has a part 'q' without a 'type'",
    ),
    (
        user({"text": "q"}),
        "turn 0 has a part {'text': 'q'} without a 'type'",
    ),
    (
        user({"type": "input_audio"}),
        "turn 0 has a part of the unknown type 'input_audio'; known: 'text', 'image', "
        "'image_url', 'video', 'video_url'",
    ),
    (
        user({"type": "text"}),
        "turn 0 has a part with the text None",
    ),
    (
        user(text("an <image>")),
        "turn 0 holds <image> in a text among typed parts; make it a part of its own",
    ),
    (
        user({**A, "max_pixels": 9}),
        "turn 0 has a part with max_pixels=9, which is not used; take it out",
    ),
    (
        user({**text("q"), "cache": 1}),
        "turn 0 has a part with cache=1, which is not used; take it out",
    ),
    (
        user({**A, "path": "b.png"}),
        "turn 0 has a part that names its image 2 times",
    ),
    (
        user({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}),
        "turn 0 has a part with detail='low', which is not used; take it out",
    ),
    (
        user({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}),
        "field 'content' holds 'https://x.org/a.png'; nothing is downloaded: save it "
        "and name the file",
    ),
    (
        messages("q", [A]),
        "turn 1 is an answer that holds <image>",
    ),
    (
        user(BARE),
        "has 1 <image> in its questions for 0 image entries",
    ),
    (
        {**user(A), "images": ["a.png"]},
        "names images both in its turns and in a field of its own; use one of them",
    ),
    (
        {**user(BARE | {"index": 1}), "images": ["a.png"]},
        "has image 1 of its list in place 0; put it in order",
    ),
]


@pytest.mark.parametrize(("raw", "line"), REFUSALS)
def test_a_record_that_would_be_misread_is_refused(raw: Any, line: str, tmp_path: Path):
    assert cause(raw, draw_media(tmp_path)) == line


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_means_something_elsewhere_is_refused_unless_it_is_empty(field: str):
    line = f"has '{field}' ({REFUSED[field]}), which is not used{LATER}"
    for value in (0, False, "x", ["x"]):
        assert cause(llava("q", "a", **{field: value})) == line
    for empty in (None, [], "", {}):
        parse(llava("q", "a", **{field: empty}))


@pytest.mark.parametrize("field", OTHER_NAMES)
def test_an_image_under_another_name_is_not_left_out_in_silence(field: str, tmp_path: Path):
    line = f"has '{field}', but {OTHER_NAMES[field]}s are read from '{OTHER_NAMES[field]}' and"
    for question in ("q", "<image>q"):
        assert cause(llava(question, "a", **{field: "a.png"})).startswith(line)
    # Beside an image it may say where that came from.
    folder = draw_media(tmp_path)
    parse(llava("<image>q", "a", image="a.png", **{field: "a.png"}), folder)
    parse(user(A, text("q")) | {field: ["a.png"]}, folder)
    parse(llava("q", "a", **{field: None}))


@pytest.mark.parametrize("field", REFUSED_OF_TURN)
def test_a_field_of_a_turn_that_means_something_elsewhere_is_refused(field: str):
    line = f"turn 1 has '{field}' ({REFUSED_OF_TURN[field]}), which is not used; take it out"
    # Messages may call tools.
    for make in (llava, messages)[: 1 if field == "tool_calls" else 2]:
        assert cause(turn(1, make("q", "a"), **{field: "x"})) == line
        parse(turn(1, make("q", "a"), **{field: None}))


@pytest.mark.parametrize("fields", OTHER_FORMATS)
def test_a_field_of_another_format_alone_is_ignored_where_it_takes_two(fields: tuple[str, ...]):
    whole = dict.fromkeys(fields, "x")
    assert "take one of them out" in cause(llava("q", "a", **whole))
    if len(fields) > 1:
        parse(llava("q", "a", **{fields[0]: "x"}))


@pytest.mark.parametrize("field", [*REFUSED, *REFUSED_OF_TURN, *sum(OTHER_FORMATS, ())])
def test_the_page_on_formats_lists_every_field_that_is_refused(field: str):
    refused = PAGE.split("## Fields that are refused")[1]
    assert f"`{field}`" in refused
