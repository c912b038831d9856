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

from regate_ds.stores.answer_index import INDEX_FORMAT, AnswerIndex
from regate_ds.stores.keys import SampleKeys

INDEX_NAME = "index.json"
"""Name of the file beside the columns."""


def save_column(folder: Path, name: str, column: np.ndarray) -> None:
    np.save(folder / f"{name}.npy", column, allow_pickle=False)


def map_column(folder: Path, name: str) -> np.ndarray:
    """Map what ``save_column`` wrote. ValueError names a file that is missing or damaged."""
    path = folder / f"{name}.npy"
    try:
        # Copy-on-write, because torch wants arrays that it may write to; nobody does.
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}; delete the folder {folder}") from error


def save_index(folder: Path, index: AnswerIndex) -> None:
    """Write the files of an index into a folder."""
    save_column(folder, "name_numbers", index.keys.name_numbers)
    save_column(folder, "record_numbers", index.keys.record_numbers)
    for name in _TENSORS:
        save_column(folder, name, getattr(index, name).numpy())
    about = {
        "format": INDEX_FORMAT,
        "fingerprint": index.fingerprint,
        "names": list(index.keys.names),
    }
    (folder / INDEX_NAME).write_text(json.dumps(about) + "\n", encoding="utf-8")


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


_TENSORS = ("offsets", "num_labels", "num_positions", "label_hashes", "digests")
"""Columns of an ``AnswerIndex`` beside its keys."""
