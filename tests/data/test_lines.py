"""Records read by their places in the file, against the reader that takes the file as a whole."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regate_ds.data.llava import lines
from regate_ds.data.llava.formats.sources import Sources
from regate_ds.data.llava.lines import RawRecords, Records, find_records
from regate_ds.data.llava.parse import Cause, Parser
from regate_ds.data.llava.read import load_raw, read_records

TALK = [{"from": "human", "value": "Wie groß?"}, {"from": "gpt", "value": "So: \u2028 \U0001f600."}]
OBJECT = {"id": 7, "conversations": TALK}
PLAIN = json.dumps(OBJECT)
WIDE = json.dumps(OBJECT, ensure_ascii=False)
VALUES = [PLAIN, WIDE, "12", "-1.5e3", "null", '"a,]"', "[1, [2]]", "{}", "NaN", "true"]

LISTS = [
    "[]",
    " [ ] \n",
    *(f"[{value}]" for value in VALUES),
    "[" + ",".join(VALUES) + "]",
    " \r\n[ " + " ,\n".join(VALUES) + " \t]\n\n",
    "[" + ", ".join([PLAIN, WIDE] * 9) + "]",
    json.dumps([OBJECT, OBJECT], indent=2),
]

LINES = [
    "",
    "\n\n",
    f"{PLAIN}\n{WIDE}\n",
    f"{PLAIN}\n{WIDE}",
    f"\n \n{PLAIN}\r\n\r\n\u3000\n\x0b\n{WIDE}\r{PLAIN}\n\x1c\n",
    f"{PLAIN}\nnot json\n[1]\n{WIDE[:-1]}\n12\n\u2028\n\u00e4\n{PLAIN}",
]


@pytest.fixture(params=[1, 7, 64, 1 << 22])
def chunk(request, monkeypatch):
    """So many bytes are read at a time: the parts end within records and within characters."""
    monkeypatch.setattr(lines, "_CHUNK", request.param)


def write(folder: Path, text: str, suffix: str, start: bytes = b"") -> Path:
    path = folder / f"data{suffix}"
    path.write_bytes(start + text.encode())
    return path


def shown(raw: Any) -> str:
    return f"Cause: {raw}" if isinstance(raw, Cause) else repr(raw)


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize(
    ("text", "suffix"), [*((t, ".json") for t in LISTS), *((t, ".jsonl") for t in LINES)]
)
@pytest.mark.usefixtures("chunk")
def test_records_one_by_one_are_those_of_the_whole_file(tmp_path, text, suffix, start):
    path = write(tmp_path, text, suffix, start)
    found = RawRecords(path, find_records(path))
    one_by_one = [shown(found[number]) for number in range(len(found))]
    assert one_by_one == [shown(raw) for raw in load_raw(path)]


WRONG = ["", "{}", "[1", "[1,]", "[1 2]", "[,1]", "[1],", "[1]x", "[tru]", "1", "[1.]", '["a]']


@pytest.mark.parametrize("text", WRONG)
@pytest.mark.usefixtures("chunk")
def test_a_file_that_is_no_list_is_refused_in_the_same_words(tmp_path, text):
    path = write(tmp_path, text, ".json")
    with pytest.raises(ValueError, match=r"data\.json") as whole:
        load_raw(path)
    with pytest.raises(ValueError, match=r"data\.json") as one_by_one:
        find_records(path)
    assert str(one_by_one.value) == str(whole.value)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("bad", [b"\xff", b"\xe2\x80"])
@pytest.mark.usefixtures("chunk")
def test_a_file_that_is_not_utf8_is_refused_in_the_same_words(tmp_path, suffix, bad):
    path = tmp_path / f"data{suffix}"
    for content in (b'["' + bad + b'"]', b'["a"]' + bad):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not JSON") as whole:
            load_raw(path)
        with pytest.raises(ValueError, match="is not JSON") as one_by_one:
            find_records(path)
        assert str(one_by_one.value) == str(whole.value)


@pytest.mark.parametrize(
    ("text", "suffix", "told"),
    [
        ('[{"é": 1}, {"b": "' + "x" * 200, ".json", "the record at byte 12 is longer than"),
        ('{"é": 1}\n{"b": "' + "x" * 200, ".jsonl", "the record at byte 10 is longer than"),
        ("[" + "1, " * 40 + "é", ".json", "Expecting value at byte 121"),
        ("[" + "1, " * 40 + '{"é" 1}]', ".json", "Expecting ':' delimiter at byte 127"),
        ("[" + "1, " * 40, ".json", "Expecting value at byte 121"),
        ("{}" + " " * 99, ".json", "no '\\[' at byte 0"),
    ],
)
@pytest.mark.usefixtures("chunk")
def test_a_large_file_is_refused_without_reading_it_whole(
    tmp_path, monkeypatch, text, suffix, told
):
    monkeypatch.setattr(lines, "MAX_RECORD", 100)
    monkeypatch.setattr(lines, "load_raw", None)
    path = write(tmp_path, text, suffix)
    with pytest.raises(ValueError, match=rf"data{suffix} is not JSON \({told}"):
        find_records(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no data file .*absent\.json"):
        find_records(tmp_path / "absent.json")


def records_of(path: Path, numbers: list[int]) -> Records:
    parser = Parser(path, "set", Sources(path.parent), verify_images=False)
    raw = RawRecords(path, find_records(path))
    return Records(raw, parser, np.array(numbers, dtype=np.int64), "delete it")


def test_usable_records_read_like_a_list_of_them(tmp_path):
    path = write(tmp_path, f"[1, {PLAIN}, {WIDE}, {PLAIN}]", ".json")
    expected, _ = read_records(path, name="set", skip_bad=True)
    records = records_of(path, [1, 2, 3])
    assert list(records) == expected
    assert list(records[1:]) == expected[1:]
    assert (records[-1], len(records)) == (expected[-1], 3)
    assert list(pickle.loads(pickle.dumps(records))) == expected


def test_a_record_that_has_become_bad_is_named(tmp_path):
    path = write(tmp_path, f"{PLAIN}\n{PLAIN}\n", ".jsonl")
    records = records_of(path, [0, 1])
    content = path.read_bytes()
    path.write_bytes(content[: len(PLAIN) + 1] + b"x" + content[len(PLAIN) + 2 :])
    assert records[0].key == ("set", 0)
    with pytest.raises(ValueError, match=r"data\.jsonl, record 1: is not JSON .*; delete it"):
        records[1]
