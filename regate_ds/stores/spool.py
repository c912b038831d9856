"""The text of samples that can only be read in order, on disk, so that any of them can be read.

    starts.npy       int64 [S+1]: the tokens of sample i are ``starts[i]`` to ``starts[i+1]``
    names.json       the names of the data sets
    name_numbers.npy, record_numbers.npy    int32, int64 [S]: the keys
    ids.npy, labels.npy                     int32 [T]: the token ids, and the token at t+1 or IGNORE
    placeholders.npy                        bool [T]: True at image positions

Nine bytes a token, and no pixels. Shapes: S samples, T tokens of all samples.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from regate_ds.algorithm.batch import SampleKey
from regate_ds.parallel.layout import ProcessGroup, rank_in
from regate_ds.stores.atomic_file import make_folder
from regate_ds.stores.digests import IndexedSample
from regate_ds.stores.index_files import ColumnWriter, map_column
from regate_ds.stores.shard_job import await_store, on_first

_COLUMNS: dict[str, type] = {
    "starts": np.int64,
    "name_numbers": np.int32,
    "record_numbers": np.int64,
    "ids": np.int32,
    "labels": np.int32,
    "placeholders": np.bool_,
}

SPOOL_NAMES = "names.json"
"""The file that is written last."""


@dataclass(frozen=True)
class SpooledSample:
    """What a teacher and an index need to know of a sample."""

    key: SampleKey
    input_ids_S: Tensor
    labels_S: Tensor
    is_placeholder_S: Tensor


def write_spool(folder: Path, samples: Iterable[IndexedSample]) -> None:
    """Write the samples into an empty folder, as they come.

    ValueError for a token id that takes more than 32 bits, or if there is no sample.
    """
    columns = {name: ColumnWriter(folder, name, dtype) for name, dtype in _COLUMNS.items()}
    names: dict[str, int] = {}
    end = 0
    columns["starts"].append(np.zeros(1))
    for sample in samples:
        name, number = sample.key
        end += sample.input_ids_S.numel()
        rows = {
            "starts": [end],
            "name_numbers": [names.setdefault(name, len(names))],
            "record_numbers": [number],
            "ids": _as_int32(sample.input_ids_S, sample.key),
            "labels": _as_int32(sample.labels_S, sample.key),
            "placeholders": sample.is_placeholder_S.numpy(force=True),
        }
        for column, row in rows.items():
            columns[column].append(np.asarray(row))
    for column in columns.values():
        column.close()
    if not names:
        raise ValueError(
            "the stream gave no item; give one that has not been read to its end, or set its epochs"
        )
    (folder / SPOOL_NAMES).write_text(json.dumps(list(names)), encoding="utf-8")


def _as_int32(ids_S: Tensor, key: SampleKey) -> np.ndarray:
    ids = ids_S.numpy(force=True)
    narrow = ids.astype(np.int32)
    if not np.array_equal(narrow, ids):
        raise ValueError(
            f"sample {key[0]!r} record {key[1]} has the token {ids[narrow != ids][0]}; give ids "
            "and labels below 2,147,483,648"
        )
    return narrow


class Spool:
    """The samples of a folder, mapped."""

    def __init__(self, folder: Path) -> None:
        self._names: list[str] = json.loads((folder / SPOOL_NAMES).read_text(encoding="utf-8"))
        self._columns = {name: map_column(folder, name) for name in _COLUMNS}

    def __len__(self) -> int:
        return len(self._columns["record_numbers"])

    def __iter__(self) -> Iterator[SpooledSample]:
        return map(self.read, range(len(self)))

    def read(self, row: int) -> SpooledSample:
        columns = self._columns
        tokens = slice(*columns["starts"][row : row + 2].tolist())
        return SpooledSample(
            key=(self._names[columns["name_numbers"][row]], int(columns["record_numbers"][row])),
            input_ids_S=torch.from_numpy(columns["ids"][tokens].astype(np.int64)),
            labels_S=torch.from_numpy(columns["labels"][tokens].astype(np.int64)),
            is_placeholder_S=torch.from_numpy(columns["placeholders"][tokens].copy()),
        )


@contextmanager
def spooled(
    folder: Path,
    samples: Iterable[IndexedSample],
    group: ProcessGroup | None,
    device: torch.device | str,
) -> Iterator[Spool]:
    """Let the first rank write the samples, and delete them when all ranks leave the block.

    What a killed job left in the folder is written anew. All ranks of ``group`` make this call;
    ``device`` is where its backend wants tensors. An error of the first rank, here or in the
    block, deletes the samples too; one of writing them is raised on all ranks.
    """

    def write() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder)
        write_spool(folder, samples)

    try:
        on_first(write, group, device)
        await_store(folder, file=SPOOL_NAMES)
        yield Spool(folder)
    except BaseException:
        if rank_in(group) == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    on_first(partial(shutil.rmtree, folder), group, device)
