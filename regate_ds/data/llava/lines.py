"""Read the records of a file one by one, by where each lies in it.

A file of millions of records never lies in memory as Python objects: ``find_records`` passes
through it once, and ``Records`` reads a record when it is asked for.

Shapes: R records of the file, S of them in use.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from regate_ds.data.llava.parse import Cause, Parser, id_of
from regate_ds.data.llava.read import load_raw, not_json, parse_line
from regate_ds.data.llava.records import BadRecord, Record

_CHUNK = 1 << 22
"""Bytes that are read at a time."""

MAX_RECORD = 1 << 28
"""Bytes of a record above which its file is refused: most likely a quote or a line's end is
missing. A larger file is never read as a whole."""

_BOM = codecs.BOM_UTF8
_SPACE = re.compile(r"[ \t\n\r]*")
_NEWLINE, _RETURN = 10, 13


def find_records(path: Path) -> np.ndarray:
    """Return int64 [R, 2]: the first byte of each record and the byte after its last one.

    ValueError names a file that holds no records, as ``read_records`` does.
    """
    if path.is_file():
        places = array("q")
        try:
            for place in _lines(path) if path.suffix == ".jsonl" else _items(path):
                places.extend(place)
            return np.frombuffer(places, dtype=np.int64).reshape(-1, 2)
        except (ValueError, RecursionError) as error:
            if path.stat().st_size > MAX_RECORD:
                raise not_json(path, error) from error
    # What is wrong is said best by the reader that takes the file as a whole.
    load_raw(path)
    raise AssertionError(f"{path} is read as a whole, but not record by record")


class RawRecords:
    """The raw records of a file, by number."""

    def __init__(self, path: Path, places: np.ndarray) -> None:
        """places: int64 [R, 2], as ``find_records`` returns them, or those of some records."""
        self.path, self._places = path, places
        self._file: int | None = None

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Any:
        """Return a record; in place of a line that is not JSON, its Cause."""
        start, end = self._places[number].tolist()
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        # Several processes may share the file, so none of them moves its place.
        content = os.pread(self._file, end - start, start)
        try:
            return parse_line(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            return Cause(f"is not UTF-8 ({error})")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]


class Records(Sequence[Record]):
    """The usable records of a file, each read and checked when it is asked for."""

    def __init__(self, raw: Any, parser: Parser, numbers_S: np.ndarray, way_out: str) -> None:
        """raw: the raw records by number, and their ``path``. numbers_S: int64 [S], the records'
        numbers in the data. way_out: what to do about a record that was usable and is no more."""
        self._raw, self._parser, self._way_out = raw, parser, way_out
        self._numbers_S = numbers_S

    def __len__(self) -> int:
        return len(self._numbers_S)

    @overload
    def __getitem__(self, row: int) -> Record: ...

    @overload
    def __getitem__(self, row: slice) -> Records: ...

    def __getitem__(self, row: int | slice) -> Record | Records:
        """Return one record, or some of them as such a sequence.

        ValueError names a record that has become a bad one since it was found usable.
        """
        if isinstance(row, slice):
            return Records(self._raw, self._parser, self._numbers_S[row], self._way_out)
        number = int(self._numbers_S[row])
        raw = self._raw[number]
        try:
            return self._parser.record(number, raw)
        except Cause as cause:
            bad = BadRecord(self._raw.path, number, id_of(raw), str(cause))
            raise has_become_bad(bad, self._way_out) from cause


def has_become_bad(bad: BadRecord, way_out: str) -> ValueError:
    """Make the error for a record that could be used when the data was indexed."""
    return ValueError(f"{bad}, but was usable when the data was indexed; {way_out}")


def _lines(path: Path) -> Iterator[tuple[int, int]]:
    """Yield the place of each line that is not empty."""
    start, rest = 0, b""
    for chunk in _decodable(path):
        text = rest + chunk
        codes = np.frombuffer(text, dtype=np.uint8)
        ends = np.flatnonzero((codes == _NEWLINE) | (codes == _RETURN)).tolist()
        begin = 0
        for end in ends:
            yield from _line(text, start, begin, end)
            begin = end + 1
        start, rest = start + begin, text[begin:]
        _require_short(len(rest), start)
    yield from _line(rest, start, 0, len(rest))


def _require_short(num_bytes: int, start: int) -> None:
    if num_bytes > MAX_RECORD:
        raise ValueError(f"the record at byte {start} is longer than {MAX_RECORD >> 20} MiB")


def _line(text: bytes, start: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
    if start + begin == 0 and text.startswith(_BOM):
        begin = len(_BOM)
    # Most lines are objects; of others, only the characters tell whether they are empty.
    if text[begin : begin + 1] == b"{" or text[begin:end].decode("utf-8").strip():
        yield start + begin, start + end


def _items(path: Path) -> Iterator[tuple[int, int]]:
    """Yield the place of each item of a JSON list. ValueError if the file holds anything else."""
    text = _Text(path)
    text.expect("[")
    if text.is_next("]"):
        text.expect("]")
    else:
        while True:
            yield text.item()
            if text.is_next("]"):
                text.expect("]")
                break
            text.expect(",")
    text.expect("")


class _Text:
    """The text of a JSON file, of which a part is in memory."""

    def __init__(self, path: Path) -> None:
        self._chunks = _decodable(path)
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._decoder = json.JSONDecoder()
        self._text, self._at, self._byte = "", 0, 0
        self._has_more = True
        self._read(1)
        if self._text.startswith("\ufeff"):
            self._step(1)

    def item(self) -> tuple[int, int]:
        """Step over one value, and return its first byte and the byte after its last one."""
        self._skip_space()
        while True:
            try:
                _, end = self._decoder.raw_decode(self._text, self._at)
                # Only what follows tells that a value is at its end: a number may go on.
                if not self._has_more or self._text[end : end + 1] in (*" \t\n\r,]",):
                    break
            except json.JSONDecodeError as error:
                if not self._has_more:
                    # json's own place is one in the part that is in memory.
                    at = self._byte + len(self._text[self._at : error.pos].encode("utf-8"))
                    raise ValueError(f"{error.msg} at byte {at}") from error
            length = len(self._text) - self._at
            _require_short(length, self._byte)
            self._read(2 * length)
        start = self._byte
        self._step(end - self._at)
        return start, self._byte

    def is_next(self, sign: str) -> bool:
        """Return whether a sign comes next after white space; "" is the end of the file."""
        self._skip_space()
        return self._text[self._at : self._at + 1] == sign

    def expect(self, sign: str) -> None:
        """Step over a sign and the white space before it."""
        if not self.is_next(sign):
            raise ValueError(f"no {sign!r} at byte {self._byte}")
        self._step(len(sign))

    def _skip_space(self) -> None:
        while True:
            end = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            self._step(end - self._at)
            if end < len(self._text) or not self._has_more:
                return
            self._read(1)

    def _step(self, num_characters: int) -> None:
        passed = self._text[self._at : self._at + num_characters]
        self._at += num_characters
        self._byte += len(passed) if passed.isascii() else len(passed.encode("utf-8"))

    def _read(self, num_characters: int) -> None:
        """Have at least so many characters from here on, if the file has them."""
        parts = [self._text[self._at :]]
        missing = num_characters - len(parts[0])
        while missing > 0 and self._has_more:
            chunk = next(self._chunks, None)
            self._has_more = chunk is not None
            parts.append(self._decode(chunk or b"", final=chunk is None))
            missing -= len(parts[-1])
        self._text, self._at = "".join(parts), 0


def _decodable(path: Path) -> Iterator[bytes]:
    """Yield the file's bytes in chunks. ValueError if they are not UTF-8."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            decode(chunk)
            yield chunk
    decode(b"", final=True)
