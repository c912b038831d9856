"""Read Parquet files and data set folders by Hugging Face's ``datasets``.

A row is a raw record: images and videos are objects with bytes or a path, as they are stored, and
none is decoded here.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SUFFIX = ".parquet"


def is_table(path: Path) -> bool:
    """Return whether a data path is a Parquet file, a folder, or the split of a folder."""
    return path.suffix == SUFFIX or path.is_dir() or _is_split(path)


class DataTable:
    """The rows of a Parquet file, a folder of data files, or a folder that `save_to_disk` wrote."""

    def __init__(self, path: Path) -> None:
        """Open a table.

        path: FOLDER/SPLIT where a folder has several splits.

        ValueError if `datasets` is not installed, or cannot read it.
        """
        if find_spec("datasets") is None:
            raise ValueError(
                f"{path} is read by Hugging Face's datasets, which is not installed; run "
                "`pip install datasets`, or give a JSON or JSONL file"
            )
        self._rows = _open(path).with_format("arrow")

    def __len__(self) -> int:
        return len(self._rows)

    def raw(self, number: int) -> dict[str, Any]:
        """Return a row as a raw record."""
        return self._rows[number].to_pylist()[0]


def _open(path: Path) -> Any:
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
