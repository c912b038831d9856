"""MosaicML's shards: the columns of a sample are the fields of its record.

A shard is a number of samples n, n + 1 places in the file, and the samples. A sample is the sizes
of the columns that have no fixed one, then the columns in order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from regate_ds.data.llava.records import Cause
from regate_ds.data.shards.folder import SHARD_COLUMNS

_WORD = 4
"""Bytes of a number in a shard."""


def samples_in_mds(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield the name of each sample of a shard, and where it begins and ends.

    ValueError if the file is shorter than it says.
    """
    with path.open("rb") as file:
        count = int.from_bytes(file.read(_WORD), "little")
        found = file.read(_WORD * (count + 1))
    places = np.frombuffer(found, np.uint32, len(found) // _WORD).tolist()
    if [len(places), *places[-1:]] != [count + 1, path.stat().st_size] or places != sorted(places):
        raise ValueError(f"{path} is not whole; fetch it again")
    for number, (start, end) in enumerate(zip(places, places[1:])):
        yield str(number), start, end


def read_mds_sample(content: bytes, about: dict[str, Any]) -> Any:
    """Return the raw record of a sample's bytes; a Cause if a column cannot be read.

    about: the index's word on the shard's columns, by ``SHARD_COLUMNS``.
    """
    names, encodings, fixed = (about[key] for key in SHARD_COLUMNS)
    num_given = sum(not size for size in fixed)
    num_there = min(num_given, len(content) // _WORD)
    given = iter(np.frombuffer(content, np.uint32, num_there).tolist())
    sizes = [size or next(given, 0) for size in fixed]
    ends = np.cumsum([_WORD * num_given, *sizes]).tolist()
    if ends[-1] != len(content):
        return Cause(f"has {len(content)} bytes, where its columns have {ends[-1]}")
    record: dict[str, Any] = {}
    for name, encoding, start, end in zip(names, encodings, ends[:-1], ends[1:], strict=True):
        read = _READERS.get(encoding)
        if read is None:
            known = ", ".join(_READERS)
            return Cause(
                f"column {name!r} has the encoding {encoding!r}, which is not read; use {known}"
            )
        try:
            record[name] = read(content[start:end])
        except (ValueError, RecursionError) as error:
            return Cause(f"column {name!r} is no {encoding} ({error})")
    return record


def _integer(content: bytes) -> int:
    return int(np.frombuffer(content, np.int64)[0])


def _picture(content: bytes) -> Image.Image:
    width, height, size = np.frombuffer(content, np.uint32, 3).tolist()
    start = 3 * _WORD
    mode = content[start : start + size].decode()
    return Image.frombytes(mode, (width, height), content[start + size :])


def _list_of(read: Callable[[bytes], Any]) -> Callable[[bytes], list[Any]]:
    def read_list(content: bytes) -> list[Any]:
        # The first number is kept for later versions.
        count = int(np.frombuffer(content, np.uint32, 1, _WORD)[0])
        sizes = np.frombuffer(content, np.uint32, count, 2 * _WORD).tolist()
        ends = (np.cumsum([0, *sizes]) + (2 + count) * _WORD).tolist()
        return [read(content[start:end]) for start, end in zip(ends, ends[1:])]

    return read_list


_READERS: dict[str, Callable[[bytes], Any]] = {
    "str": bytes.decode,
    "json": json.loads,
    "bytes": bytes,
    "jpeg": bytes,
    "png": bytes,
    "pil": _picture,
    "int": _integer,
    "str_int": lambda content: int(content.decode()),
    "list[jpeg]": _list_of(bytes),
    "list[png]": _list_of(bytes),
    "list[pil]": _list_of(_picture),
}
