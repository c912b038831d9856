"""What is remembered of each answer token: columns of fp32 values, one for each label position.

The values are spread over the data ranks by sample: rank ``r % size`` owns row r. Shapes: N label
positions of the samples that a call names, R samples (rows of the answer index).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regate_ds.algorithm.batch import SampleKey, TokenBatch
from regate_ds.parallel.collectives import exchange, exchange_counts
from regate_ds.parallel.layout import ProcessGroup, rank_in, size_of
from regate_ds.stores.answer_index import AnswerIndex, spans
from regate_ds.stores.difficulty.sidecars import (
    COLUMN,
    DIFFICULTY,
    find_sidecars,
    read_sidecar,
    require_columns,
    require_one_moment,
    write_sidecar,
)
from regate_ds.stores.same_samples import require_as_indexed

SIDECAR_FORMAT = 2
"""Version of the sidecar files."""


SIDECAR_STEM = "difficulty"
"""Start of the sidecar files' names."""


class DifficultyStore:
    """Named columns over every label position, each of its own value before the first write.

    With a group, ``read`` and ``write`` are collective: every data rank calls them, each for its
    own samples (a rank may name none). Without a group, or on a single rank, nothing is sent.
    """

    def __init__(
        self,
        index: AnswerIndex,
        group: ProcessGroup | None = None,
        *,
        columns: Mapping[str, float] = DIFFICULTY,
        device: torch.device | str = "cpu",
    ) -> None:
        """columns: the value of a position before its first write, by the column's name.
        device: where the group's backend wants its tensors. Values stay on the CPU."""
        self.index = index
        self._rank, self._size = rank_in(group), size_of(group)
        self._group = group if self._size > 1 else None
        self._device = device
        num_owned = index.num_labels[self._rank :: self._size]
        self._start_of_owned = num_owned.cumsum(0)
        self._start_of_owned -= num_owned
        size = int(num_owned.sum())
        self._columns = {name: torch.full((size,), unseen) for name, unseen in columns.items()}
        self._num_writes = 0

    def admit(self, window: Sequence[TokenBatch]) -> None:
        """Refuse, by ``ValueError`` naming it, a sample that differs from the index."""
        require_as_indexed(window, self.index)

    def read(self, keys: Sequence[SampleKey]) -> dict[str, Tensor]:
        """Return fp32 [N] a column: all label positions of these samples, in the given order."""
        rows_R = torch.tensor(self.index.rows(keys), dtype=torch.int64)
        if self._group is None:
            where_N = self._locate(rows_R)
            return {name: values[where_N] for name, values in self._columns.items()}
        return self._read_from_owners(rows_R)

    def write(self, keys: Sequence[SampleKey], values: Mapping[str, Tensor]) -> None:
        """Replace all columns of these samples.

        If a call writes one sample several times (by several ranks or by one), the values of the
        highest rank count, and of these the last.
        """
        rows_R = torch.tensor(self.index.rows(keys), dtype=torch.int64)
        num_expected = int(self.index.num_labels[rows_R].sum())
        self._require_values(len(keys), num_expected, values)
        columns = {name: values[name].detach().to("cpu", torch.float32) for name in self._columns}
        if self._group is not None:
            rows_R, columns = self._send_to_owners(rows_R, columns)
        self._store(rows_R, columns)
        self._num_writes += 1

    def _require_values(
        self, num_samples: int, num_expected: int, values: Mapping[str, Tensor]
    ) -> None:
        if values.keys() != self._columns.keys():
            raise ValueError(
                f"the store has the columns {sorted(self._columns)}, got {sorted(values)}; write "
                "each of them"
            )
        for name, values_N in values.items():
            if values_N.shape != (num_expected,):
                raise ValueError(
                    f"{num_samples} samples have {num_expected} label positions, got {name} of "
                    f"shape {tuple(values_N.shape)}; write one value for each"
                )

    def save(self, folder: Path) -> None:
        """Write this rank's sidecar file, atomically. Every data rank calls it."""
        arrays: dict[str, Any] = {
            "format": np.int64(SIDECAR_FORMAT),
            "fingerprint": np.array(self.index.fingerprint),
            "num_writes": np.int64(self._num_writes),
            **{COLUMN + name: values.numpy() for name, values in self._columns.items()},
        }
        name = f"{SIDECAR_STEM}-{self._rank}-of-{self._size}.npz"
        write_sidecar(Path(folder) / name, arrays)

    @property
    def num_ranks(self) -> int:
        """Number of data ranks that the values are spread over, and so of sidecar files."""
        return self._size

    @property
    def num_writes(self) -> int:
        """Number of calls of ``write``; it tells two saves of one run apart."""
        return self._num_writes

    def load(self, folder: Path, *, num_ranks: int | None = None) -> None:
        """Load what any number of ranks saved. If it fails, this store stays as it was.

        num_ranks: number of ranks of the save to load, where the folder may hold several saves.
        ValueError names a file that is missing, unreadable or of another save.
        """
        paths = find_sidecars(Path(folder), num_ranks, stem=SIDECAR_STEM)
        columns = {name: torch.empty_like(values) for name, values in self._columns.items()}
        moments = {}
        for rank, path in enumerate(paths):
            saved = read_sidecar(path, SIDECAR_FORMAT)
            self._require_same_data(saved, path)
            require_columns(saved, self._columns, path)
            moments[path.name] = int(saved["num_writes"])
            rows_R = torch.arange(rank, self.index.num_samples, len(paths))
            for name, values in columns.items():
                self._take_owned(values, rows_R, torch.from_numpy(saved[COLUMN + name]))
        self._columns, self._num_writes = columns, require_one_moment(moments, folder)

    def _locate(self, rows_R: Tensor) -> Tensor:
        """Return int64 [N]: the places, in this rank's array, of the values of rows it owns."""
        owned_R = rows_R.div(self._size, rounding_mode="floor")
        return spans(self._start_of_owned[owned_R], self.index.num_labels[rows_R])

    def _store(self, rows_R: Tensor, columns: Mapping[str, Tensor]) -> None:
        # Assigning through repeated positions would let any of them win: choose the last here.
        last = sorted({row: i for i, row in enumerate(rows_R.tolist())}.values())
        lengths_R = self.index.num_labels[rows_R]
        starts_R = lengths_R.cumsum(0) - lengths_R
        chosen = spans(starts_R[last], lengths_R[last])
        where_N = self._locate(rows_R[last])
        for name, values_N in columns.items():
            self._columns[name][where_N] = values_N[chosen]

    def _by_owner(self, rows_R: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Return an order of the rows by owner, and each owner's number of rows and of values."""
        owner_R = rows_R % self._size
        order_R = owner_R.argsort(stable=True)
        num_rows = torch.bincount(owner_R, minlength=self._size)
        return order_R, num_rows.tolist(), self._num_values(rows_R[order_R], num_rows.tolist())

    def _num_values(self, rows_R: Tensor, num_rows: list[int]) -> list[int]:
        """Count the values of each rank's rows, where ``rows_R`` lists the rows rank by rank."""
        return [int(part.sum()) for part in self.index.num_labels[rows_R].split(num_rows)]

    def _read_from_owners(self, rows_R: Tensor) -> dict[str, Tensor]:
        order_R, num_asked, num_returned = self._by_owner(rows_R)
        wanted_R, num_wanted = self._send(rows_R[order_R], num_asked)
        num_answered = self._num_values(wanted_R, num_wanted)
        where_N = self._locate(wanted_R)
        lengths_R = self.index.num_labels[rows_R]
        sorted_lengths_R = lengths_R[order_R]
        starts_R = torch.empty_like(lengths_R)
        starts_R[order_R] = sorted_lengths_R.cumsum(0) - sorted_lengths_R
        order_N = spans(starts_R, lengths_R)

        def returned(values: Tensor) -> Tensor:
            answer_N = values[where_N]
            return exchange(answer_N, num_answered, num_returned, self._group, self._device)

        return {name: returned(values)[order_N] for name, values in self._columns.items()}

    def _send_to_owners(
        self, rows_R: Tensor, columns: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        order_R, num_rows, num_values = self._by_owner(rows_R)
        lengths_R = self.index.num_labels[rows_R]
        starts_R = lengths_R.cumsum(0) - lengths_R
        order_N = spans(starts_R[order_R], lengths_R[order_R])
        owned_R, num_received = self._send(rows_R[order_R], num_rows)
        num_owned = self._num_values(owned_R, num_received)

        def received(values_N: Tensor) -> Tensor:
            sent_N = values_N[order_N]
            return exchange(sent_N, num_values, num_owned, self._group, self._device)

        return owned_R, {name: received(values_N) for name, values_N in columns.items()}

    def _send(self, rows_R: Tensor, num_sent: list[int]) -> tuple[Tensor, list[int]]:
        """Send rows to the ranks; return the rows received, by rank, and their number by rank."""
        num_received = exchange_counts(num_sent, self._group, self._device)
        received_R = exchange(rows_R, num_sent, num_received, self._group, self._device)
        return received_R, num_received

    def _require_same_data(self, saved: dict[str, np.ndarray], path: Path) -> None:
        if (found := str(saved["fingerprint"])) != self.index.fingerprint:
            raise ValueError(
                f"{path} belongs to data with fingerprint {found}, this run's data has "
                f"{self.index.fingerprint}; resume with the data that the run was started on"
            )

    def _take_owned(self, into: Tensor, rows_R: Tensor, saved_N: Tensor) -> None:
        """Copy the values of those saved rows that this rank owns."""
        lengths_R = self.index.num_labels[rows_R]
        starts_R = lengths_R.cumsum(0) - lengths_R
        own_R = rows_R % self._size == self._rank
        into[self._locate(rows_R[own_R])] = saved_N[spans(starts_R[own_R], lengths_R[own_R])]
