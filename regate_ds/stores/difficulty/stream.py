"""The difficulty of samples that no index lists beforehand: streams, and augmented data.

A sample is remembered by its key and a hash over its answer tokens; with other answers it is new
again. The values are spread over the data ranks by a hash of the key, so that any rank may see
any sample. The memory in use grows with the number of samples seen.

Shapes: N label positions of the samples that a call names, R samples, in rows of (hash of the key,
hash of the labels, number of labels).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regate_ds.algorithm.batch import SampleKey, TokenBatch
from regate_ds.parallel.collectives import exchange, exchange_counts
from regate_ds.parallel.layout import ProcessGroup, rank_in, size_of
from regate_ds.stores.answer_index import spans
from regate_ds.stores.difficulty.sidecars import (
    COLUMN,
    DIFFICULTY,
    find_sidecars,
    read_sidecar,
    require_columns,
    require_one_moment,
    write_sidecar,
)
from regate_ds.stores.digests import hash_labels
from regate_ds.stores.same_samples import labelled_samples

STREAM_FORMAT = 2
"""Version of the sidecar files."""

STREAM_STEM = "stream-difficulty"
"""Start of the sidecar files' names."""


class StreamDifficulty:
    """The difficulty of every label position of the samples seen; before the first
    write it is the column's value for what was never seen.

    With a group, ``read`` and ``write`` are collective, as those of ``DifficultyStore`` are.
    """

    def __init__(
        self,
        group: ProcessGroup | None = None,
        *,
        columns: Mapping[str, float] = DIFFICULTY,
        device: torch.device | str = "cpu",
    ) -> None:
        """columns: the value of a position before its first write, by the column's name.
        device: where the group's backend wants its tensors. Values stay on the CPU."""
        self._columns = dict(columns)
        self._rank, self._size = rank_in(group), size_of(group)
        self._group = group if self._size > 1 else None
        self._device = device
        # Arrays, not tensors: those would take a kilobyte more for each sample.
        self._known: dict[int, tuple[int, np.ndarray]] = {}  # labels' hash, values [columns, N]
        self._admitted: dict[SampleKey, tuple[int, int, int]] = {}
        self._num_writes = 0

    @property
    def num_ranks(self) -> int:
        """Number of data ranks that the values are spread over, and so of sidecar files."""
        return self._size

    @property
    def num_writes(self) -> int:
        """Number of calls of ``write``; it tells two saves of one run apart."""
        return self._num_writes

    def admit(self, window: Sequence[TokenBatch]) -> None:
        """Take note of the samples that ``read`` and ``write`` will name, until the next window.

        ValueError if a key comes twice with different answers, which the key cannot tell apart.
        """
        self._admitted = {}
        for batch in window:
            for key, labels_N, _, _ in labelled_samples(batch):
                row = _hash_key(key), hash_labels(labels_N), len(labels_N)
                if self._admitted.setdefault(key, row) != row:
                    raise ValueError(
                        f"sample {key[0]!r} record {key[1]} comes twice in one step with different "
                        "answer tokens; give each form of a sample a key of its own"
                    )

    def read(self, keys: Sequence[SampleKey]) -> dict[str, Tensor]:
        """Return fp32 [N] a column: all label positions of these samples, in the given order."""
        rows_R3 = self._rows(keys)
        order_R, num_sent = self._by_owner(rows_R3)
        asked_R3, num_received = self._send(rows_R3[order_R], num_sent)
        empty = torch.empty(len(self._columns), 0)
        answer_CN = torch.cat([empty, *(self._value(*row) for row in asked_R3.tolist())], 1)
        lengths_R = rows_R3[:, 2]
        num_answered = _sums(asked_R3[:, 2], num_received)
        num_returned = _sums(lengths_R[order_R], num_sent)
        starts_R = torch.empty_like(lengths_R)
        starts_R[order_R] = lengths_R[order_R].cumsum(0) - lengths_R[order_R]
        order_N = spans(starts_R, lengths_R)

        def returned(answer_N: Tensor) -> Tensor:
            return exchange(answer_N, num_answered, num_returned, self._group, self._device)

        return {n: returned(row)[order_N] for n, row in zip(self._columns, answer_CN, strict=True)}

    def write(self, keys: Sequence[SampleKey], values: Mapping[str, Tensor]) -> None:
        """Replace all columns of these samples; the last in (rank, order) wins."""
        rows_R3 = self._rows(keys)
        order_R, num_sent = self._by_owner(rows_R3)
        lengths_R = rows_R3[:, 2]
        starts_R = lengths_R.cumsum(0) - lengths_R
        order_N = spans(starts_R[order_R], lengths_R[order_R])
        owned_R3, num_received = self._send(rows_R3[order_R], num_sent)
        num_values = _sums(lengths_R[order_R], num_sent)
        num_owned = _sums(owned_R3[:, 2], num_received)

        def received(name: str) -> Tensor:
            sent_N = values[name].detach().to("cpu", torch.float32)[order_N]
            return exchange(sent_N, num_values, num_owned, self._group, self._device)

        owned_CN = torch.stack([received(name) for name in self._columns])
        parts = owned_CN.split(owned_R3[:, 2].tolist(), 1)
        for (key, labels, _), part_CN in zip(owned_R3.tolist(), parts, strict=True):
            self._known[key] = labels, part_CN.numpy().copy()
        self._num_writes += 1

    def save(self, folder: Path) -> None:
        """Write this rank's sidecar file, atomically. Every data rank calls it."""
        keys = sorted(self._known)
        labels = [self._known[key][0] for key in keys]
        values = [self._known[key][1] for key in keys]
        arrays: dict[str, Any] = {
            "format": np.int64(STREAM_FORMAT),
            "num_writes": np.int64(self._num_writes),
            "keys": np.array(keys, dtype=np.int64),
            "labels": np.array(labels, dtype=np.int64),
            "num_labels": np.array([x.shape[1] for x in values], dtype=np.int64),
            **{COLUMN + n: row for n, row in zip(self._columns, self._joined(values))},
        }
        name = f"{STREAM_STEM}-{self._rank}-of-{self._size}.npz"
        write_sidecar(Path(folder) / name, arrays)

    def load(self, folder: Path, *, num_ranks: int | None = None) -> None:
        """Load what any number of ranks saved. If it fails, this store stays as it was."""
        known: dict[int, tuple[int, np.ndarray]] = {}
        moments: dict[str, int] = {}
        for path in find_sidecars(Path(folder), num_ranks, stem=STREAM_STEM):
            saved = read_sidecar(path, STREAM_FORMAT)
            require_columns(saved, self._columns, path)
            moments[path.name] = int(saved["num_writes"])
            columns = np.stack([saved[COLUMN + name] for name in self._columns])
            values = np.split(columns, saved["num_labels"].cumsum()[:-1], 1)
            for key, labels, value in zip(saved["keys"].tolist(), saved["labels"].tolist(), values):
                if key % self._size == self._rank:
                    known[key] = labels, value.copy()
        self._known, self._num_writes = known, require_one_moment(moments, folder)

    def _rows(self, keys: Sequence[SampleKey]) -> Tensor:
        """Return int64 [R, 3]: the row that ``admit`` noted for each key."""
        rows = [self._admitted[key] for key in keys]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)

    def _value(self, key: int, labels: int, num_labels: int) -> Tensor:
        known_labels, value = self._known.get(key, (None, None))
        if value is None or known_labels != labels:
            unseen_C = torch.tensor(list(self._columns.values()))
            return unseen_C[:, None].expand(-1, num_labels)
        return torch.from_numpy(value)

    def _joined(self, values: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.empty((len(self._columns), 0), np.float32), *values], 1)

    def _by_owner(self, rows_R3: Tensor) -> tuple[Tensor, list[int]]:
        """Return an order of the rows by owner, and each owner's number of rows."""
        owner_R = rows_R3[:, 0] % self._size
        return owner_R.argsort(stable=True), owner_R.bincount(minlength=self._size).tolist()

    def _send(self, rows_R3: Tensor, num_sent: list[int]) -> tuple[Tensor, list[int]]:
        """Send rows to the ranks; return the rows received, by rank, and their number by rank."""
        num_received = exchange_counts(num_sent, self._group, self._device)
        sent, received = ([3 * n for n in counts] for counts in (num_sent, num_received))
        flat = exchange(rows_R3.flatten(), sent, received, self._group, self._device)
        return flat.view(-1, 3), num_received


def _sums(lengths_R: Tensor, num_rows: list[int]) -> list[int]:
    return [int(part.sum()) for part in lengths_R.split(num_rows)]


def _hash_key(key: SampleKey) -> int:
    """Return a hash of 63 bits, so that it is not negative as int64."""
    name, number = key
    digest = hashlib.blake2b(f"{number} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
