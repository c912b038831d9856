"""The teacher's losses on disk: computed once, only read while training.

Files and names are those of manifest.py. Shapes: S samples of the index, N label positions of the
samples asked for.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from regate_ds.algorithm.batch import SampleKey
from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.stores.reference.manifest import (
    Manifest,
    content_of,
    damaged,
    index_path,
    rows_path,
    shard_path,
    starts_of,
)
from regate_ds.stores.reference.shard import VALUE, checked_values, describe_samples, open_shard

Verify = Literal["quick", "full"]


class ReferenceStore:
    """Reference losses of a data set, memory-mapped.

    Opening compares the manifest and the index with their checksums, and each shard's own checksum
    with the manifest's. The values of a shard are compared with it when the first of them is read,
    or all on opening with ``verify="full"``: no value is given out of a file with a wrong byte.
    """

    def __init__(self, path: Path | str, *, verify: Verify = "quick") -> None:
        """Open a finished store. What is missing or damaged is a ``ValueError`` naming it."""
        self.path = Path(path)
        self._manifest = Manifest.load(self.path)
        self._require_finished()
        self.index = load_index(self.path, self._manifest)
        rows_S = load_rows(self.path, self._manifest)
        self._shard_S, self._start_S = self._find_places(rows_S)
        self._opened = [
            open_shard(shard_path(self.path, number), shard)
            for number, shard in enumerate(self._manifest.shards)
        ]
        self._checked: dict[int, np.ndarray] = {}
        if verify == "full":
            self._verify(rows_S)

    @property
    def fingerprint(self) -> str:
        return self._manifest.fingerprint

    @property
    def teacher_id(self) -> str:
        return self._manifest.teacher_id

    @property
    def num_shards(self) -> int:
        return len(self._manifest.shards)

    def require(self, fingerprint: str) -> None:
        """Refuse, by ``ValueError``, to serve data other than what the teacher has read."""
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"the reference losses in {self.path} belong to data with fingerprint "
                f"{self.fingerprint}, this run's data has {fingerprint}; "
                "run `regate teacher` on this data, or train on the other"
            )

    def read(self, keys: Sequence[SampleKey]) -> Tensor:
        """fp32 [N] in nats: all label positions of these samples, in the given order."""
        rows = self.index.rows(keys)
        lengths = self.index.num_labels[rows].tolist()
        places = zip(self._shard_S[rows].tolist(), self._start_S[rows].tolist(), lengths)
        parts = [self._values(shard)[start : start + length] for shard, start, length in places]
        # The empty array gives a window without samples a type.
        values_N = np.concatenate([np.empty(0, VALUE), *parts]).astype(np.float32)
        return torch.from_numpy(values_N)

    def _values(self, number: int) -> np.ndarray:
        if number not in self._checked:
            path, shard = shard_path(self.path, number), self._manifest.shards[number]
            self._checked[number] = checked_values(self._opened[number], path, shard)
        return self._checked[number]

    def _verify(self, rows_S: np.ndarray) -> None:
        """Every byte of every shard, and that they are of the index's samples."""
        starts = starts_of([shard.num_rows for shard in self._manifest.shards])
        for number, shard in enumerate(self._manifest.shards):
            self._values(number)
            digests = self.index.digests[rows_S[starts[number] : starts[number + 1]]]
            samples = describe_samples(self.teacher_id, shard.tokens_per_batch, digests)
            if samples != shard.samples:
                raise damaged(shard_path(self.path, number), "it is of other samples")

    def _require_finished(self) -> None:
        if self._manifest.is_finished:
            return
        shards = self._manifest.shards
        missing = [n for n in range(len(shards)) if not shard_path(self.path, n).exists()]
        raise ValueError(
            f"the reference store {self.path} is not finished ({len(missing)} of {len(shards)} "
            "shards are still to compute); run `regate teacher` again, it goes on where it stopped"
        )

    def _find_places(self, rows_S: np.ndarray) -> tuple[Tensor, Tensor]:
        """For each row of the index its shard, and its values' start in it: int64 [S] each."""
        shards = self._manifest.shards
        shard_S, start_S = torch.empty(2, len(rows_S), dtype=torch.int64)
        num_rows = torch.tensor([shard.num_rows for shard in shards], dtype=torch.int64)
        num_values = torch.tensor([shard.num_values for shard in shards], dtype=torch.int64)
        shard_of_S = torch.arange(len(shards)).repeat_interleave(num_rows)
        order_S, starts = torch.from_numpy(rows_S), num_values.cumsum(0) - num_values
        lengths_S = self.index.num_labels[order_S]
        shard_S[order_S] = shard_of_S
        start_S[order_S] = lengths_S.cumsum(0) - lengths_S - starts[shard_of_S]
        return shard_S, start_S


def load_index(store: Path, manifest: Manifest) -> AnswerIndex:
    """The index that a manifest names. ValueError if it is missing or damaged."""
    path = index_path(store, manifest)
    content_of(path, manifest.index_sha256)
    return AnswerIndex.load(path)


def load_rows(store: Path, manifest: Manifest) -> np.ndarray:
    """int64 [S]: rows of the index, shard by shard. ValueError if they are missing or damaged."""
    content = content_of(rows_path(store, manifest), manifest.rows_sha256)
    return np.load(io.BytesIO(content), allow_pickle=False)
