"""Find and read the raw records of any data path: of a file, a table or shards.

Shapes: R records.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from regate_ds.data.llava.lines import RawRecords, find_records
from regate_ds.data.llava.read import require_file
from regate_ds.data.llava.tables import SUFFIX, TableRecords, find_rows, folder_of, is_table
from regate_ds.data.shards.folder import data_shards, described_by, folder_of_shards, is_shards
from regate_ds.data.shards.records import ShardRecords, find_samples

_DATA_SUFFIXES = frozenset({".arrow", ".csv", ".json", ".jsonl", ".parquet"})
"""Suffixes of the files in a folder that say what its records are."""

CACHE_NAME = ".regate_cache"
"""Folder beside the data that the index of it is kept in. Hugging Face's datasets, which reads a
folder's files by their suffixes, passes over names that begin with a dot."""


def require_data(path: Path) -> None:
    """Refuse, by ValueError, a data path that is not there."""
    if is_shards(path):
        data_shards(path)
    elif not is_table(path) or (path.suffix == SUFFIX and not path.exists()):
        require_file(path)


def find_places(path: Path) -> np.ndarray:
    """Return int64 [R, 2]: where each record lies. ValueError if the path holds no records."""
    if is_shards(path):
        return find_samples(path)
    return find_rows(path) if is_table(path) else find_records(path)


def open_raw(path: Path, places: np.ndarray) -> RawRecords | TableRecords | ShardRecords:
    """Return the records at these places."""
    if is_shards(path):
        return ShardRecords(path, places)
    return (TableRecords if is_table(path) else RawRecords)(path, places)


def image_root_of(path: Path) -> Path:
    """Return the folder that image names are relative to where no other is given."""
    return data_folder(path) or path.parent


def data_folder(path: Path) -> Path | None:
    """Return the folder whose files are the data; None for a file."""
    if is_shards(path):
        return None if path.is_file() else folder_of_shards(path)
    return folder_of(path)


def data_files(path: Path) -> list[Path]:
    """Return the files that hold the records, in order; those of a folder are found by suffix."""
    if is_shards(path):
        return [*described_by(path), *data_shards(path)]
    folder = folder_of(path)
    if folder is None:
        return [path]
    found = (each for each in folder.rglob("*") if each.suffix in _DATA_SUFFIXES)
    seen = sorted(each for each in found if not _is_hidden(each.relative_to(folder)))
    if not seen:
        raise ValueError(f"{folder} holds no file of {', '.join(sorted(_DATA_SUFFIXES))}")
    return seen


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
