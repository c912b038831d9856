"""Writes conversations in the formats of data files, and reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from regate_ds.data.llava.formats.sources import Sources
from regate_ds.data.llava.lines import RawRecords, find_records
from regate_ds.data.llava.parse import Parser
from regate_ds.data.llava.read import read_records
from regate_ds.data.llava.records import Cause, Record

SPOKEN = (("human", "user"), ("gpt", "assistant"))


def parse(raw: Any, folder: Path = Path(".")) -> Record:
    return Parser(folder / "data.json", "set", Sources(folder), verify_images=True).record(3, raw)


def cause(raw: Any, folder: Path = Path(".")) -> str:
    with pytest.raises(Cause) as error:
        parse(raw, folder)
    return str(error.value)


def read_both_ways(path: Path) -> tuple[list[Record], list[str]]:
    """Read a file as a whole, and record by record, which must say the same."""
    whole, bad = read_records(path, name="set", skip_bad=True, verify_images=False)
    raw = RawRecords(path, find_records(path))
    parser = Parser(path, "set", Sources(path.parent), verify_images=False)
    found: list[Record] = []
    causes: list[tuple[int, str]] = []
    for number in range(len(raw)):
        try:
            found.append(parser.record(number, raw[number]))
        except Cause as cause:
            causes.append((number, str(cause)))
    assert found == whole
    assert causes == [(one.number, one.cause) for one in bad]
    return whole, [str(one) for one in bad]


def llava(*texts: str, **fields: Any) -> dict[str, Any]:
    turns = [{"from": SPOKEN[n % 2][0], "value": text} for n, text in enumerate(texts)]
    return {"conversations": turns, **fields}


def messages(*contents: Any, **fields: Any) -> dict[str, Any]:
    turns = [{"role": SPOKEN[n % 2][1], "content": text} for n, text in enumerate(contents)]
    return {"messages": turns, **fields}


def turn(number: int, raw: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The record with more fields in one of its turns."""
    name = "messages" if "messages" in raw else "conversations"
    turns = [dict(each, **fields) if n == number else each for n, each in enumerate(raw[name])]
    return {**raw, name: turns}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def draw_media(folder: Path) -> Path:
    """Put two images, and a clip of two frames, into a folder."""
    (folder / "clip").mkdir()
    for name in ("a.png", "b.png", "clip/1.png", "clip/2.png"):
        Image.effect_noise((8, 6), 50).convert("RGB").save(folder / name)
    return folder
