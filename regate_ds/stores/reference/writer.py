"""Write a reference store shard by shard, so that a killed job loses only unfinished shards.

A shard appears whole, by atomic rename; the manifest gets the checksums last. Any number of
processes may write to one store, each its own shards. lifecycle.py begins a store, resumes it and
adds samples to it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.stores.atomic_file import write_atomically
from regate_ds.stores.kind import MANIFEST_NAME
from regate_ds.stores.reference.lifecycle import leftovers
from regate_ds.stores.reference.manifest import APPEND_NAME, REFERENCE, Manifest, Shard, starts_of
from regate_ds.stores.reference.reader import load_rows
from regate_ds.stores.reference.shard import LARGEST, rounded, shard_files


class ReferenceWriter:
    """A store that is being computed; ``begin_store`` must have made its folder ready."""

    def __init__(self, path: Path, index: AnswerIndex) -> None:
        self.path = path
        self._name, self._manifest = MANIFEST_NAME, Manifest.load(path)
        if self._manifest.fingerprint != index.fingerprint:
            self._name, self._manifest = APPEND_NAME, Manifest.load(path, APPEND_NAME)
        self._index = index
        self._rows_S = load_rows(path, self._manifest)
        self._starts = starts_of([shard.num_rows for shard in self._manifest.shards])
        self.files = shard_files(path, self._manifest.shards)

    @property
    def shards(self) -> tuple[Shard, ...]:
        return self._manifest.shards

    def rows(self, number: int) -> Tensor:
        """Return the rows of the index that a shard holds, in the order of their values."""
        return torch.from_numpy(self._rows_S[self._starts[number] : self._starts[number + 1]])

    def write_shard(self, number: int, values_N: Tensor) -> None:
        """Write the losses, in nats, of a shard's samples in the order of its rows.

        ``ValueError`` names the sample whose loss fp16 cannot hold. ``OSError`` names the file if
        the store has vanished or the disk is full.
        """
        shard = self.shards[number]
        if values_N.shape != (shard.num_values,):
            raise ValueError(
                f"shard {number} of {self.path} holds {shard.num_values} values, got "
                f"{tuple(values_N.shape)}; score every label position of its samples once"
            )
        self._require_storable(number, values_N)
        REFERENCE.require_there(self.path / self._name)
        self.files[number].write(rounded(values_N))

    def finish(self) -> None:
        """Check every shard, write the checksums into the manifest, and delete the files that a
        killed job left behind. One process calls it, last."""
        REFERENCE.require_there(self.path / self._name)
        shards = tuple(replace(s, sha256=f.check()) for s, f in zip(self.shards, self.files))
        self._manifest = replace(self._manifest, shards=shards)
        write_atomically(self.path / MANIFEST_NAME, self._manifest.to_bytes())
        for path in leftovers(self.path, self._manifest):
            path.unlink()

    def _require_storable(self, number: int, values_N: Tensor) -> None:
        """Refuse, by ``ValueError`` naming the sample, a loss that fp16 cannot hold."""
        is_bad_N = ~(values_N.abs() <= LARGEST)
        if not bool(is_bad_N.any()):
            return
        position, rows = int(is_bad_N.nonzero()[0]), self.rows(number)
        ends = self._index.num_labels[rows].cumsum(0)
        row = int(rows[torch.searchsorted(ends, position, right=True)])
        name, record = self._index.keys[row]
        raise ValueError(
            f"the teacher's loss of sample {name!r} record {record} is {float(values_N[position])} "
            f"nats, beyond what the store holds ({LARGEST}); check the teacher's weights, run "
            "it in bf16 or fp32, or leave the sample out"
        )
