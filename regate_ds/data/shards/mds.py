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
from regate_ds.data.shards.folder import read_index

_WORD = 4
"""Bytes of a number in a shard."""


def samples_in_mds(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield the name of each sample of a shard, and where it begins and ends.

    ValueError if the file is shorter than it says.
    """
    with path.open("rb") as file:
        count = int(np.frombuffer(file.read(_WORD), np.uint32)[0])
        places = np.frombuffer(file.read(_WORD * (count + 1)), np.uint32).tolist()
    if len(places) != count + 1 or places[-1] != path.stat().st_size:
        raise ValueError(f"{path} is not whole; fetch it again")
    for number, (start, end) in enumerate(zip(places, places[1:])):
        yield str(number), start, end


def read_mds_sample(content: bytes, shard: Path) -> Any:
    """Return the raw record of a sample's bytes; a Cause if a column cannot be read."""
    (about,) = (a for a in read_index(shard.parent) if a["raw_data"]["basename"] == shard.name)
    names, encodings, sizes = (about[f"column_{what}"] for what in ("names", "encodings", "sizes"))
    given = iter(np.frombuffer(content, np.uint32, sum(not size for size in sizes)).tolist())
    begin, record = _WORD * sum(not size for size in sizes), {}
    for name, encoding, fixed in zip(names, encodings, sizes, strict=True):
        end = begin + (fixed or next(given))
        read = _READERS.get(encoding)
        if read is None:
            known = ", ".join(_READERS)
            return Cause(
                f"column {name!r} has the encoding {encoding!r}, which is not read; use {known}"
            )
        record[name] = read(content[begin:end])
        begin = end
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
