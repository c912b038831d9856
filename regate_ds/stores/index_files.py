"""An answer index as plain arrays in a folder, which all ranks of a node map together.

    index.json           format, fingerprint, and the names of the data sets
    COLUMN.npy           one file for each column

``AnswerIndex.save`` writes the one file of a store; this folder is for an index that is opened at
every start of a run.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from regate_ds.stores.answer_index import INDEX_FORMAT, AnswerIndex, start_fingerprint
from regate_ds.stores.digests import NUM_WORDS, as_words
from regate_ds.stores.index_part import IndexPart
from regate_ds.stores.keys import SampleKeys

INDEX_NAME = "index.json"
"""Name of the file beside the columns."""


class ColumnWriter:
    """Writes a column part by part, so that it never lies in memory as a whole."""

    def __init__(self, folder: Path, name: str, dtype: type, width: int | None = None) -> None:
        """width: number of values of each row; None makes a column of one axis."""
        self._file = (folder / f"{name}.npy").open("wb")
        self._dtype, self._rest = np.dtype(dtype), () if width is None else (width,)
        self.num_rows = 0
        self._write_header()

    def append(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows, self._dtype).reshape(-1, *self._rest).data)
        self.num_rows += len(rows)

    def close(self) -> None:
        """Write how many rows there are, and close the file."""
        # numpy leaves room in a header for its first axis to grow.
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        shape = (self.num_rows, *self._rest)
        about = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, about)


class IndexWriter:
    """Writes the index of one data set part by part, as ``map_index`` reads it."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._columns = {
            name: ColumnWriter(folder, name, dtype, width)
            for name, (dtype, width) in _COLUMNS.items()
        }
        self._columns["offsets"].append(np.zeros(1))
        self._fingerprint = start_fingerprint()
        self._num_tokens, self._last = 0, -1

    def append(self, part: IndexPart) -> None:
        """Add the samples that come next; their record numbers rise."""
        numbers = part.keys.record_numbers
        if len(numbers) == 0:
            return
        assert part.keys.names == (self._name,)
        assert numbers[0] > self._last
        assert (np.diff(numbers) > 0).all()
        offsets = self._num_tokens + part.num_labels.cumsum()
        self._num_tokens, self._last = int(offsets[-1]), int(numbers[-1])
        self._fingerprint.update(part.digests)
        columns = {
            "name_numbers": part.keys.name_numbers,
            "record_numbers": numbers,
            "offsets": offsets,
            "num_labels": part.num_labels,
            "num_positions": part.num_positions,
            "label_hashes": part.label_hashes,
            "digests": as_words([part.digests]).numpy(),
        }
        for name, rows in columns.items():
            self._columns[name].append(rows)

    def close(self) -> None:
        """Write what remains, and close the files."""
        for column in self._columns.values():
            column.close()
        about = {
            "format": INDEX_FORMAT,
            "fingerprint": self._fingerprint.hexdigest(),
            "names": [self._name] if self._last >= 0 else [],
        }
        (self._folder / INDEX_NAME).write_text(json.dumps(about) + "\n", encoding="utf-8")


def map_column(folder: Path, name: str) -> np.ndarray:
    """Map what a ``ColumnWriter`` wrote. ValueError names a file that is missing or damaged."""
    path = folder / f"{name}.npy"
    try:
        # Copy-on-write, because torch wants arrays that it may write to; nobody does.
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}; delete the folder {folder}") from error


def map_index(folder: Path) -> AnswerIndex:
    """Map the files of an index. ValueError names a file that is missing or damaged."""
    path = folder / INDEX_NAME
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}; delete the folder {folder}") from error
    numbers = (map_column(folder, name) for name in ("name_numbers", "record_numbers"))
    tensors: dict[str, Tensor] = {n: torch.from_numpy(map_column(folder, n)) for n in _TENSORS}
    return AnswerIndex(
        keys=SampleKeys(about["names"], *numbers), **tensors, fingerprint=about["fingerprint"]
    )


_COLUMNS = {
    "name_numbers": (np.int32, None),
    "record_numbers": (np.int64, None),
    "offsets": (np.int64, None),
    "num_labels": (np.int64, None),
    "num_positions": (np.int64, None),
    "label_hashes": (np.int64, None),
    "digests": (np.int64, NUM_WORDS),
}
"""Type and width of each column of an ``AnswerIndex``."""

_TENSORS = tuple(name for name in _COLUMNS if name not in ("name_numbers", "record_numbers"))
"""The columns beside the keys."""
