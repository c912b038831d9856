"""Samples, and shards of them that are written plainly."""

from __future__ import annotations

import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from regate_ds.data.llava.formats.sources import Sources
from regate_ds.data.llava.parse import Parser
from regate_ds.data.llava.records import Record
from regate_ds.data.shards.records import ShardRecords, find_samples

Sample = dict[str, bytes]
"""Its members by their field; "__key__" is its name."""


def picture(width: int, height: int = 3, form: str = "PNG") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (width, height), (9 * width, 0, 50)).save(buffer, format=form)
    return buffer.getvalue()


def talk(number: int, images: int = 0) -> list[dict[str, str]]:
    asked = "<image>" * images + f"q{number}"
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": f"answer {number}"}]


def samples(num: int = 7) -> list[Sample]:
    """With one image, none, or two that the record names; the first has Megatron's bare list."""
    made = []
    for number in range(num):
        key = f"{number:04d}"
        images = {
            field: picture(4 + number) for field in (["jpg"], [], ["0.png", "1.png"])[number % 3]
        }
        record: Any = {"conversations": talk(number, len(images)), "id": f"id{number}"}
        if len(images) == 2:
            record["images"] = [f"{key}.0.png", "1.png"]
        content = record["conversations"] if number == 0 else record
        made.append({"__key__": key.encode(), "json": json.dumps(content).encode(), **images})
    return made


def write_tars(folder: Path, found: list[Sample], size: int = 3, long: str = "") -> list[Path]:
    """long: a prefix of the names, for which tar needs headers of their own."""
    paths = []
    for start in range(0, len(found), size):
        paths.append(folder / f"shard-{len(paths):03d}.tar")
        with tarfile.open(paths[-1], "w") as file:
            for sample in found[start : start + size]:
                for field, content in sample.items():
                    if field != "__key__":
                        about = tarfile.TarInfo(f"{long}{sample['__key__'].decode()}.{field}")
                        about.size = len(content)
                        file.addfile(about, BytesIO(content))
    return paths


COLUMNS = {"conversations": "json", "id": "str", "images": "list[png]", "number": "int"}
"""MosaicML's encodings of the columns that ``write_mds`` writes."""


def rows(num: int = 5) -> list[dict[str, Any]]:
    made = []
    for number in range(num):
        images = [picture(4 + number + n) for n in range(number % 3)]
        turns = talk(number, len(images))
        made.append(
            {"conversations": turns, "id": f"é{number}", "images": images, "number": number}
        )
    return made


def write_mds(folder: Path, found: list[dict[str, Any]], size: int = 3) -> None:
    """As MosaicML's MDSWriter does."""
    names = sorted(COLUMNS)
    shards = []
    for start in range(0, len(found), size):
        part = [_encoded(row, names) for row in found[start : start + size]]
        about = {
            "column_encodings": [COLUMNS[name] for name in names],
            "column_names": names,
            "column_sizes": [8 if COLUMNS[name] == "int" else None for name in names],
            "compression": None,
            "format": "mds",
        }
        head = json.dumps(about, sort_keys=True).encode()
        first = 4 + 4 * (len(part) + 1) + len(head)
        places = np.cumsum([first, *map(len, part)]).astype(np.uint32)
        content = np.uint32(len(part)).tobytes() + places.tobytes() + head + b"".join(part)
        name = f"shard.{len(shards):05d}.mds"
        (folder / name).write_bytes(content)
        raw = {"basename": name, "bytes": len(content), "hashes": {}}
        shards.append({**about, "raw_data": raw, "samples": len(part), "zip_data": None})
    (folder / "index.json").write_text(json.dumps({"shards": shards, "version": 2}))


def _encoded(row: dict[str, Any], names: list[str]) -> bytes:
    images = row["images"]
    sizes = np.array([0, len(images), *map(len, images)], np.uint32)
    columns = {
        "conversations": json.dumps(row["conversations"]).encode(),
        "id": row["id"].encode(),
        "images": sizes.tobytes() + b"".join(images),
        "number": np.int64(row["number"]).tobytes(),
    }
    lengths = [len(columns[name]) for name in names if name != "number"]
    return np.array(lengths, np.uint32).tobytes() + b"".join(columns[name] for name in names)


def records_of(path: Path) -> list[Record]:
    raw = ShardRecords(path, find_samples(path))
    parser = Parser(path, "set", Sources(path.parent), verify_images=True)
    return [parser.record(number, raw[number]) for number in range(len(raw))]


def told(records: list[Record]) -> list[Any]:
    """What records hold, but for where they come from and what they are called."""
    return [
        ([image.content for image in record.images], record.images_per_marker, record.turns)  # type: ignore[union-attr]
        for record in records
    ]
