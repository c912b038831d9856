"""Read LLaVA-format files into records, and find the bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regate_ds.data.llava.formats.sources import Sources
from regate_ds.data.llava.parse import Cause, Parser, id_of
from regate_ds.data.llava.records import BadRecord, Record, bad_record


def read_records(
    path: Path,
    *,
    name: str,
    image_root: Path | None = None,
    skip_bad: bool = False,
    verify_images: bool = True,
) -> tuple[list[Record], list[BadRecord]]:
    """Read a LLaVA JSON list (or, with suffix .jsonl, one object a line).

    image_root: folder that image names are relative to; None is the folder of the file.
    verify_images: False only checks that image files exist.

    The key of a record is (``name``, its number in the file), whether or not records before it were
    left out. A bad record raises SampleError, or with ``skip_bad`` is returned in the second list.
    A file that is not JSON at all raises ValueError in both cases.
    """
    sources = Sources(image_root or path.parent)
    parser = Parser(path, name, sources, verify_images=verify_images)
    records: list[Record] = []
    bad: list[BadRecord] = []
    for number, raw in enumerate(load_raw(path)):
        try:
            records.append(parser.record(number, raw))
        except Cause as cause:
            bad.append(BadRecord(path, number, id_of(raw), str(cause)))
            if not skip_bad:
                raise bad_record(bad[-1]) from cause
    return records, bad


def load_raw(path: Path) -> list[Any]:
    """Return the raw records; in place of a .jsonl line that is not JSON, its Cause."""
    require_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            # Not splitlines: JSON strings may hold other line separators unescaped.
            return [parse_line(line) for line in text.split("\n") if line.strip()]
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise not_json(path, error) from error
    if not isinstance(records, list):
        raise ValueError(
            f"{path} holds a {type(records).__name__}; give a JSON list of records, or a .jsonl "
            "file with one object a line"
        )
    return records


def not_json(path: Path, error: Exception) -> ValueError:
    """Make the error for a file that cannot be read, because of ``error``."""
    return ValueError(
        f"{path} is not JSON ({error}); give a JSON list of records, or a .jsonl file with one "
        "object a line"
    )


def require_file(path: Path) -> None:
    """Refuse, by ValueError, a data file that is not there."""
    if not path.is_file():
        raise ValueError(f"there is no data file {path}; give a JSON, JSONL or Parquet file")


def parse_line(line: str) -> Any:
    """Return the value of a JSON text, or a Cause if it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return Cause(f"is not JSON ({error})")
