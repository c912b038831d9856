"""Read Parquet files and data set folders by Hugging Face's ``datasets``.

A row is a raw record: images and videos are objects with bytes or a path, as they are stored, and
none is decoded here. Shapes: R rows.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

SUFFIX = ".parquet"


def is_table(path: Path) -> bool:
    """Return whether a data path is a Parquet file, a folder, or the split of a folder."""
    return path.suffix == SUFFIX or path.is_dir() or _is_split(path)


def folder_of(path: Path) -> Path | None:
    """Return the folder of a table that is one; None for a file."""
    if path.is_dir():
        return path
    return path.parent if _is_split(path) else None


def find_rows(path: Path) -> np.ndarray:
    """Return int64 [R, 2]: the number of each row and the one after it.

    path: a Parquet file or a folder; FOLDER/SPLIT where a folder has several splits. ValueError if
    `datasets` is not installed, or cannot read it.
    """
    numbers_R = np.arange(len(_open(path)), dtype=np.int64)
    return np.stack([numbers_R, numbers_R + 1], axis=1)


class TableRecords:
    """The raw records of a table, by number."""

    def __init__(self, path: Path, places: np.ndarray) -> None:
        """places: int64 [R, 2], as ``find_rows`` returns them, or those of some rows."""
        self.path, self._places = path, places
        self._rows: Any = None

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> dict[str, Any]:
        if self._rows is None:
            # Without a format, images would be decoded here.
            self._rows = _open(self.path).with_format("arrow")
        return self._rows[int(self._places[number, 0])].to_pylist()[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}


def _open(path: Path) -> Any:
    if find_spec("datasets") is None:
        raise ValueError(
            f"{path} is read by Hugging Face's datasets, which is not installed; run "
            "`pip install datasets`, or give a JSON or JSONL file"
        )
    datasets = import_module("datasets")
    folder, split = (path.parent, path.name) if _is_split(path) else (path, None)
    if not folder.exists():
        raise ValueError(f"there is no data file {path}; give a JSON, JSONL or Parquet file")
    try:
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(str(folder))
        if folder.suffix == SUFFIX:
            found = datasets.load_dataset("parquet", data_files=str(folder))
            split = "train"
        elif (folder / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(str(folder))
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read by Hugging Face's datasets ({cause})") from error
    return _split_of(found, folder, split)


def _split_of(found: Any, folder: Path, split: str | None) -> Any:
    """Return the split that is asked for, or the only one."""
    if split is None and len(found) == 1:
        return next(iter(found.values()))
    if split not in found:
        known = ", ".join(str(folder / name) for name in found)
        raise ValueError(f"{folder} has the splits {', '.join(found)}; name one of {known}")
    return found[split]


def _is_split(path: Path) -> bool:
    """Return whether a path that is not there names a split of the Parquet files in its folder."""
    if path.exists() or path.suffix:
        return False
    return any(path.parent.glob(f"*{SUFFIX}")) or any(path.parent.glob(f"*/*{SUFFIX}"))
