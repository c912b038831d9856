"""Read the reference losses from disk, where they were computed once before training.

manifest.py names the files. Shapes: S samples of the index, N label positions of the samples asked
for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from regate_ds.algorithm.batch import SampleKey
from regate_ds.algorithm.scores.score import Column
from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.stores.kind import Verify
from regate_ds.stores.reference.manifest import (
    REFERENCE,
    Manifest,
    index_path,
    rows_path,
    shard_path,
    starts_of,
)
from regate_ds.stores.reference.shard import VALUE, describe_samples, shard_files


class ReferenceStore:
    """The reference losses of a data set, memory-mapped.

    Opening a store checks the manifest, the index and the rows against their checksums, and the
    checksum at the end of each shard against the manifest. The values of a shard are checked when
    the first of them is read; ``verify="full"`` checks all of them on opening. So no value is ever
    returned from a file with a wrong byte.
    """

    def __init__(
        self, path: Path | str, *, verify: Verify = "quick", index: AnswerIndex | None = None
    ) -> None:
        """Open a finished store. ``ValueError`` names a file that is missing or damaged.

        index: the run's own index, to be used in place of the store's equal one; ValueError if the
            store is of other data.
        """
        self.path = Path(path)
        self._manifest = Manifest.load(self.path)
        self._require_finished()
        if index is not None:
            self.require(index.fingerprint)
        self.index = load_index(self.path, self._manifest) if index is None else index
        rows_S = load_rows(self.path, self._manifest)
        self._shard_S, self._start_S = self._find_places(rows_S)
        self._files = shard_files(self.path, self._manifest.shards)
        self._shard_bytes = [file.open() for file in self._files]
        self._checked_values: dict[int, np.ndarray] = {}
        if verify == "full":
            self._verify(rows_S)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the data that the losses belong to."""
        return self._manifest.fingerprint

    @property
    def teacher_id(self) -> str:
        """Name of the teacher whose losses these are."""
        return self._manifest.teacher_id

    @property
    def column(self) -> Column:
        """What the values are: `text` is a text-only teacher's losses."""
        return self._manifest.column

    @property
    def num_shards(self) -> int:
        return len(self._manifest.shards)

    def require(self, fingerprint: str) -> None:
        """Refuse, by ``ValueError``, data with another fingerprint than the teacher has read."""
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"the reference losses in {self.path} belong to data with fingerprint "
                f"{self.fingerprint}, this run's data has {fingerprint}; run `regate teacher` on "
                "this run's data, or train on the data of the store"
            )

    def require_column(self, column: Column | None) -> None:
        """Refuse, by ``ValueError``, a run that reads another column; None reads none."""
        if column not in (None, self.column):
            raise ValueError(
                f"the reference store {self.path} holds the column {self.column}, this run's score "
                f"reads {column}; run `regate teacher` with teacher.column={column} and a "
                "teacher.store of its own, or choose a score that reads the store's"
            )

    def read(self, keys: Sequence[SampleKey]) -> Tensor:
        """Return fp32 [N]: the values in nats of these samples' label positions, in this order.

        ValueError names a sample that the store does not have, or a damaged shard.
        """
        rows = self.index.rows(keys)
        lengths = self.index.num_labels[rows].tolist()
        places = zip(self._shard_S[rows].tolist(), self._start_S[rows].tolist(), lengths)
        parts = [self._values(shard)[start : start + length] for shard, start, length in places]
        # With no sample asked for, the empty array still gives a type.
        values_N = np.concatenate([np.empty(0, VALUE), *parts]).astype(np.float32)
        return torch.from_numpy(values_N)

    def _values(self, number: int) -> np.ndarray:
        """Return a shard's values; check them the first time."""
        if number not in self._checked_values:
            values = self._files[number].checked(self._shard_bytes[number])
            self._checked_values[number] = values.view(VALUE)
        return self._checked_values[number]

    def _verify(self, rows_S: np.ndarray) -> None:
        """Check every byte of every shard, and that its samples are those of the index."""
        starts = starts_of([shard.num_rows for shard in self._manifest.shards])
        for number, shard in enumerate(self._manifest.shards):
            self._values(number)
            digests = self.index.digests[rows_S[starts[number] : starts[number + 1]]]
            samples = describe_samples(self.teacher_id, shard.tokens_per_batch, digests)
            if samples != shard.samples:
                raise REFERENCE.damaged(self._files[number].path, "its values are of other samples")

    def _require_finished(self) -> None:
        if self._manifest.is_finished:
            return
        shards = self._manifest.shards
        missing = [n for n in range(len(shards)) if not shard_path(self.path, n).exists()]
        raise REFERENCE.unfinished(self.path, len(missing), len(shards))

    def _find_places(self, rows_S: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return for each row of the index its shard and its values' start: int32 and int64 [S]."""
        shard_S = torch.empty(len(rows_S), dtype=torch.int32)
        start_S = torch.empty(len(rows_S), dtype=torch.int64)
        end = 0
        # Shard by shard: of millions of samples, what is only passed through would stay in memory.
        for number, shard in enumerate(self._manifest.shards):
            rows_R = torch.from_numpy(rows_S[end : end + shard.num_rows])
            lengths_R = self.index.num_labels[rows_R]
            shard_S[rows_R] = number
            start_S[rows_R] = lengths_R.cumsum(0) - lengths_R
            end += shard.num_rows
        return shard_S, start_S


def load_index(store: Path, manifest: Manifest) -> AnswerIndex:
    """Read the index that a manifest names. ValueError if it is missing or damaged."""
    path = index_path(store, manifest)
    REFERENCE.require_content(path, manifest.index_sha256)
    return AnswerIndex.load(path)


def load_rows(store: Path, manifest: Manifest) -> np.ndarray:
    """Map int64 [S]: rows of the index, shard by shard. ValueError if the file is missing or
    damaged."""
    path = rows_path(store, manifest)
    REFERENCE.require_content(path, manifest.rows_sha256)
    # Copy-on-write, because torch wants arrays that it may write to; nobody does.
    return np.load(path, mmap_mode="c", allow_pickle=False)
