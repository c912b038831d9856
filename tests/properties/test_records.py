"""Records of every format are read as what they say, by both readers; damaged ones are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.formats.formats_helper import draw_media, read_both_ways
from tests.properties.conversations_helper import (
    IMAGES,
    Conversation,
    answers,
    conversations,
    files,
    plain_texts,
    written,
)
from tests.properties.values_helper import json_values, places

some_conversations = st.lists(conversations, max_size=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_media(tmp_path_factory.mktemp("data"))


def put(folder: Path, file: tuple[str, bytes]) -> Path:
    path = folder / f"data{file[0]}"
    path.write_bytes(file[1])
    return path


@given(data=st.data(), said=some_conversations)
def test_a_conversation_is_read_as_it_was_meant(
    data: st.DataObject, said: list[Conversation], folder: Path
):
    raw = [data.draw(written(one)) for one in said]
    path = put(folder, data.draw(files(raw)))
    expected = [one.record(number, path) for number, one in enumerate(said)]
    assert read_both_ways(path) == (expected, [])


def _wrong(draw: Any) -> Any:
    return draw(json_values.filter(lambda value: not isinstance(value, (str, list))))


@st.composite
def spoilt(draw: Any, said: Conversation) -> dict[str, Any]:
    """Write a conversation with one fault that must be told, whatever else is in it."""
    raw = draw(written(said))
    name = "messages" if "messages" in raw else "conversations"
    role, content = ("role", "content") if name == "messages" else ("from", "value")
    turns = raw[name]
    one = draw(st.sampled_from(turns))
    last = turns[-1]
    faults: dict[str, Any] = {
        "content of another type": lambda: one.update({content: _wrong(draw)}),
        "no content": lambda: one.pop(content),
        "role of another type": lambda: one.update({role: draw(json_values)}),
        "an unknown role": lambda: one.update({role: "robot"}),
        "another order": turns.reverse,
        "a turn of another type": lambda: turns.__setitem__(0, draw(json_values)),
        "no answer at the end": lambda: turns.pop(),
        "an empty answer": lambda: last.update({content: draw(st.sampled_from(["", " \n"]))}),
        "a marker in an answer": lambda: last.update({content: last[content] + "<image>"}),
        "a path in tags": lambda: last.update({content: "<img>a.png</img>" + last[content]}),
        "half a character": lambda: last.update({content: last[content] + "\ud83d"}),
        "a weight between": lambda: last.update(
            loss=draw(st.floats().filter(lambda x: x not in (0, 1)))
        ),
        "spans beyond the text": lambda: last.update(gold_spans=[[0, 10**6]]),
        "turns of another type": lambda: raw.update({name: _wrong(draw)}),
        "turns twice": lambda: raw.update(conversations=turns, messages=turns),
        "a field that is not used": lambda: raw.update(audio=["a.wav"]),
        "one image too many": lambda: raw.update(image=["a.png"] * 20, images=None),
        "an image that is none": lambda: raw.update(
            image=_wrong(draw) or 7, images=None, video=None, videos=None
        ),
    }
    fault = draw(st.sampled_from(sorted(faults)))
    faults[fault]()
    return raw


@given(data=st.data(), said=conversations)
def test_a_fault_is_told_in_one_line_by_both_readers(
    data: st.DataObject, said: Conversation, folder: Path
):
    path = put(folder, data.draw(files([data.draw(spoilt(said))])))
    records, told = read_both_ways(path)
    assert not records
    assert len(told) == 1
    assert told[0].startswith(f"{path}, record 0")
    assert len(told[0].splitlines()) == 1


@given(data=st.data(), said=conversations)
def test_with_any_value_anywhere_a_record_is_read_or_told_in_one_line(
    data: st.DataObject, said: Conversation, folder: Path
):
    records = [data.draw(written(said))]
    container, key = data.draw(st.sampled_from(places(records)))
    container[key] = data.draw(json_values)
    path = put(folder, (".json", json.dumps(records).encode()))
    found, told = read_both_ways(path)
    assert len(found) + len(told) == 1
    assert all(len(line.splitlines()) == 1 for line in told)


@given(
    question=plain_texts,
    answer=answers,
    images=st.lists(st.sampled_from(IMAGES), max_size=3),
    markers=st.integers(0, 3),
)
def test_as_many_markers_as_images_or_it_is_told(
    question: str, answer: str, images: list[str], markers: int, folder: Path
):
    turns = [
        {"from": "human", "value": "<image>" * markers + question},
        {"from": "gpt", "value": answer},
    ]
    path = put(folder, (".json", json.dumps([{"conversations": turns, "image": images}]).encode()))
    records, told = read_both_ways(path)
    assert (len(records) == 1) == (markers == len(images))
    assert len(records) + len(told) == 1
