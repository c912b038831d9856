"""The difficulty of each answer token for the student: one fp32 value for each label position.

The values are spread over the data ranks by sample: rank ``r % size`` owns row r. Shapes: N label
positions of the samples that a call names, R samples (rows of the answer index).
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from regate_ds.algorithm.batch import SampleKey, TokenBatch
from regate_ds.parallel.collectives import exchange, exchange_counts
from regate_ds.parallel.layout import ProcessGroup, rank_in, size_of
from regate_ds.stores.answer_index import AnswerIndex, spans
from regate_ds.stores.atomic_file import write_atomically
from regate_ds.stores.same_samples import require_as_indexed

SIDECAR_FORMAT = 1
"""Version of the sidecar files, which lie beside a checkpoint."""

SIDECAR_STEM = "difficulty"
"""Start of the sidecar files' names."""


class DifficultyStore:
    """The difficulty of every label position; it is 0 before the first write.

    With a group, ``read`` and ``write`` are collective: every data rank calls them, each for its
    own samples (a rank may name none). Without a group, or on a single rank, nothing is sent.
    """

    def __init__(
        self,
        index: AnswerIndex,
        group: ProcessGroup | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start at 0. ``device`` is where the group's backend wants its tensors; values stay on the
        CPU."""
        self.index = index
        self._rank, self._size = rank_in(group), size_of(group)
        self._group = group if self._size > 1 else None
        self._device = device
        num_owned = index.num_labels[self._rank :: self._size]
        self._start_of_owned = num_owned.cumsum(0) - num_owned
        self._values = torch.zeros(int(num_owned.sum()))
        self._num_writes = 0

    def admit(self, window: Sequence[TokenBatch]) -> None:
        """Refuse, by ``ValueError`` naming it, a sample that differs from the index."""
        require_as_indexed(window, self.index)

    def read(self, keys: Sequence[SampleKey]) -> Tensor:
        """Return fp32 [N] on the CPU: the values of these samples' label positions, in order."""
        rows_R = torch.tensor(self.index.rows(keys), dtype=torch.int64)
        if self._group is None:
            return self._values[self._locate(rows_R)]
        return self._read_from_owners(rows_R)

    def write(self, keys: Sequence[SampleKey], values_N: Tensor) -> None:
        """Replace the difficulty of these samples.

        If a call writes one sample several times (by several ranks or by one), the values of the
        highest rank count, and of these the last.
        """
        rows_R = torch.tensor(self.index.rows(keys), dtype=torch.int64)
        num_expected = int(self.index.num_labels[rows_R].sum())
        if values_N.shape != (num_expected,):
            raise ValueError(
                f"{len(keys)} samples have {num_expected} label positions, got values of shape "
                f"{tuple(values_N.shape)}; write one value for each"
            )
        values_N = values_N.detach().to("cpu", torch.float32)
        if self._group is not None:
            rows_R, values_N = self._send_to_owners(rows_R, values_N)
        self._store(rows_R, values_N)
        self._num_writes += 1

    def save(self, folder: Path) -> None:
        """Write this rank's sidecar file, atomically. Every data rank calls it."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            format=np.int64(SIDECAR_FORMAT),
            fingerprint=np.array(self.index.fingerprint),
            num_writes=np.int64(self._num_writes),
            values=self._values.numpy(),
        )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{SIDECAR_STEM}-{self._rank}-of-{self._size}.npz"
        write_atomically(folder / name, buffer.getvalue())

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
        values, moments = torch.zeros_like(self._values), {}
        for rank, path in enumerate(paths):
            saved = read_sidecar(path, SIDECAR_FORMAT)
            self._require_same_data(saved, path)
            moments[path.name] = int(saved["num_writes"])
            rows_R = torch.arange(rank, self.index.num_samples, len(paths))
            self._take_owned(values, rows_R, torch.from_numpy(saved["values"]))
        self._values, self._num_writes = values, require_one_moment(moments, folder)

    def _locate(self, rows_R: Tensor) -> Tensor:
        """Return int64 [N]: the places, in this rank's array, of the values of rows it owns."""
        owned_R = rows_R.div(self._size, rounding_mode="floor")
        return spans(self._start_of_owned[owned_R], self.index.num_labels[rows_R])

    def _store(self, rows_R: Tensor, values_N: Tensor) -> None:
        # An assignment through repeated positions has no defined winner: choose the last row here.
        last = sorted({row: i for i, row in enumerate(rows_R.tolist())}.values())
        lengths_R = self.index.num_labels[rows_R]
        starts_R = lengths_R.cumsum(0) - lengths_R
        chosen = spans(starts_R[last], lengths_R[last])
        self._values[self._locate(rows_R[last])] = values_N[chosen]

    def _by_owner(self, rows_R: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Return an order of the rows by owner, and each owner's number of rows and of values."""
        owner_R = rows_R % self._size
        order_R = owner_R.argsort(stable=True)
        num_rows = torch.bincount(owner_R, minlength=self._size)
        return order_R, num_rows.tolist(), self._num_values(rows_R[order_R], num_rows.tolist())

    def _num_values(self, rows_R: Tensor, num_rows: list[int]) -> list[int]:
        """Count the values of each rank's rows, where ``rows_R`` lists the rows rank by rank."""
        return [int(part.sum()) for part in self.index.num_labels[rows_R].split(num_rows)]

    def _read_from_owners(self, rows_R: Tensor) -> Tensor:
        order_R, num_asked, num_returned = self._by_owner(rows_R)
        wanted_R, num_wanted = self._send(rows_R[order_R], num_asked)
        num_answered = self._num_values(wanted_R, num_wanted)
        answer_N = self._values[self._locate(wanted_R)]
        sorted_N = exchange(answer_N, num_answered, num_returned, self._group, self._device)
        lengths_R = self.index.num_labels[rows_R]
        sorted_lengths_R = lengths_R[order_R]
        starts_R = torch.empty_like(lengths_R)
        starts_R[order_R] = sorted_lengths_R.cumsum(0) - sorted_lengths_R
        return sorted_N[spans(starts_R, lengths_R)]

    def _send_to_owners(self, rows_R: Tensor, values_N: Tensor) -> tuple[Tensor, Tensor]:
        order_R, num_rows, num_values = self._by_owner(rows_R)
        lengths_R = self.index.num_labels[rows_R]
        starts_R = lengths_R.cumsum(0) - lengths_R
        sorted_N = values_N[spans(starts_R[order_R], lengths_R[order_R])]
        owned_R, num_received = self._send(rows_R[order_R], num_rows)
        num_owned = self._num_values(owned_R, num_received)
        return owned_R, exchange(sorted_N, num_values, num_owned, self._group, self._device)

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
        owned_R = rows_R % self._size == self._rank
        into[self._locate(rows_R[owned_R])] = saved_N[spans(starts_R[owned_R], lengths_R[owned_R])]


def find_sidecars(folder: Path, num_ranks: int | None, *, stem: str) -> list[Path]:
    """Find the files of all ranks of one save, by rank. ``stem`` is the start of their names.

    ValueError if a file is missing, or if the folder has several saves and ``num_ranks`` is None.
    """
    pattern = re.compile(rf"{stem}-(\d+)-of-(\d+)\.npz")
    names = sorted(path.name for path in folder.glob(f"{stem}-*-of-*.npz"))
    sizes = sorted({int(match[2]) for name in names if (match := pattern.fullmatch(name))})
    sizes = sizes if num_ranks is None else [num_ranks]
    if len(sizes) > 1:
        raise ValueError(
            f"{folder} holds difficulty files of several saves (by {sizes} ranks); "
            "delete the older ones"
        )
    expected = [f"{stem}-{rank}-of-{size}.npz" for size in sizes for rank in range(size)]
    missing = [name for name in expected if name not in names]
    if missing or not expected:
        raise ValueError(
            f"{folder} lacks {', '.join(missing) or f'{stem}-*-of-*.npz'}; resume from a "
            "checkpoint that all data ranks of the run saved"
        )
    return [folder / name for name in expected]


def require_one_moment(moments: dict[str, int], folder: Path) -> int:
    """Return the number of writes that all files of a save have. ValueError if they differ."""
    if len(set(moments.values())) > 1:
        raise ValueError(
            f"the difficulty files in {folder} are of different moments (number of writes: "
            f"{moments}), as the save was cut short; resume from an older checkpoint"
        )
    return next(iter(moments.values()))


def read_sidecar(path: Path, version: int) -> dict[str, np.ndarray]:
    """Read one sidecar file. ValueError names it if it is unreadable or of another version."""
    try:
        with np.load(path, allow_pickle=False) as file:
            saved = {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"cannot read the difficulty file {path}: {error}; resume from an older checkpoint"
        ) from error
    if (found := int(saved.get("format", 0))) != version:
        raise ValueError(
            f"{path} has difficulty format {found}, this version reads {version}; resume with the "
            "version that saved it"
        )
    return saved
