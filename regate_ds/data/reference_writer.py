"""Write a reference store shard by shard, so that a killed job loses only what was in flight.

A shard appears whole, by atomic rename, and is never written twice; the manifest gets its checksums
last. Any number of processes may write to one store, each its own shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from regate_ds.data.answer_index import AnswerIndex
from regate_ds.data.atomic_file import TEMPORARY_SUFFIX, write_atomically
from regate_ds.data.reference_store import (
    INDEX_NAME,
    MANIFEST_NAME,
    VALUE,
    Manifest,
    Shard,
    hash_file,
    read_shard,
    shard_path,
)

LARGEST = 65504.0
"""Largest finite fp16 number, in nats."""


class ReferenceWriter:
    """A store that is being computed; made by ``create``."""

    def __init__(self, path: Path, index: AnswerIndex, manifest: Manifest) -> None:
        self.path = path
        self._index = index
        self._manifest = manifest

    @classmethod
    def create(
        cls, path: Path, index: AnswerIndex, teacher_id: str, shard_rows: Sequence[Sequence[int]]
    ) -> ReferenceWriter:
        """Begin a store, or go on with one that was begun for the same data, teacher and shards.

        ``shard_rows``: for each shard the rows of the index in it; every row in exactly one. A
        store of anything else at ``path`` is a ``ValueError`` that names both.
        """
        _require_partition(shard_rows, index.num_samples)
        shards = tuple(
            Shard(tuple(rows), int(index.num_labels[list(rows)].sum())) for rows in shard_rows
        )
        path.mkdir(parents=True, exist_ok=True)
        plan = Manifest(index.fingerprint, teacher_id, shards)
        begun = begun_store(path, index, teacher_id)
        if begun is not None and begun.plan != plan:
            raise ValueError(
                f"the reference store {path} was begun with {len(begun.shards)} other shards than "
                f"the {len(shards)} asked for; use the batch settings that it was begun with, or "
                "delete it"
            )
        if begun is None or not (path / INDEX_NAME).exists():
            index.save(path / INDEX_NAME)
        manifest = plan if begun is None else _reopened(path, begun)
        if manifest != begun:
            write_atomically(path / MANIFEST_NAME, manifest.to_bytes())
        return cls(path, index, manifest)

    def has_shard(self, number: int) -> bool:
        """Whether the shard is there; a damaged one is a ``ValueError`` naming the file."""
        path = shard_path(self.path, number)
        if not path.exists():
            return False
        read_shard(path, self._manifest.shards[number])
        return True

    def write_shard(self, number: int, values_N: Tensor) -> None:
        """Store the values, in nats, of a shard's samples in the order of its rows.

        A value that fp16 cannot hold is a ``ValueError`` naming its sample.
        """
        shard = self._manifest.shards[number]
        if values_N.shape != (shard.num_values,):
            raise ValueError(
                f"shard {number} of {self.path} holds {shard.num_values} values, got "
                f"{tuple(values_N.shape)}; score every label position of its samples once"
            )
        self._require_storable(shard, values_N)
        stored = values_N.detach().cpu().numpy().astype(VALUE).tobytes()
        write_atomically(shard_path(self.path, number), stored + hashlib.sha256(stored).digest())

    def finish(self) -> None:
        """Check every shard and give the manifest their checksums. One process calls it, last."""
        shards = []
        for number, shard in enumerate(self._manifest.shards):
            values_N = read_shard(shard_path(self.path, number), shard)
            shards.append(replace(shard, sha256=hashlib.sha256(values_N.data).hexdigest()))
        for leftover in self.path.glob(f".*{TEMPORARY_SUFFIX}"):
            leftover.unlink()
        index_sha256 = hash_file(self.path / INDEX_NAME)
        self._manifest = replace(self._manifest, shards=tuple(shards), index_sha256=index_sha256)
        write_atomically(self.path / MANIFEST_NAME, self._manifest.to_bytes())

    def _require_storable(self, shard: Shard, values_N: Tensor) -> None:
        is_bad_N = ~(values_N.abs() <= LARGEST)
        if not bool(is_bad_N.any()):
            return
        position = int(is_bad_N.nonzero()[0])
        ends = self._index.num_labels[list(shard.rows)].cumsum(0)
        row = shard.rows[int(torch.searchsorted(ends, position, right=True))]
        name, number = self._index.keys[row]
        raise ValueError(
            f"the teacher's loss of sample {name!r} record {number} is {float(values_N[position])} "
            f"nats, beyond what the store holds ({LARGEST}); check the teacher's weights, run "
            "it in bf16 or fp32, or leave the sample out"
        )


def has_all_files(path: Path, manifest: Manifest) -> bool:
    """Whether the store at ``path`` has its index and all of its shards, by name only."""
    shards = (shard_path(path, number) for number in range(len(manifest.shards)))
    return (path / INDEX_NAME).exists() and all(shard.exists() for shard in shards)


def begun_store(path: Path, index: AnswerIndex, teacher_id: str) -> Manifest | None:
    """The manifest of a store of this data and teacher at ``path``; None if there is none.

    A store of other data or of another teacher is a ``ValueError`` naming both; so are shards that
    nothing tells the owner of.
    """
    if not (path / MANIFEST_NAME).exists():
        if any(path.glob("shard-*.fp16")):
            raise ValueError(
                f"{path} holds shards but no {MANIFEST_NAME}, so that nothing tells of which data "
                "and teacher they are; restore it from a copy, or delete the folder"
            )
        return None
    found = Manifest.load(path)
    for what, old, new in (
        ("data with fingerprint", found.fingerprint, index.fingerprint),
        ("teacher", found.teacher_id, teacher_id),
    ):
        if old != new:
            raise ValueError(
                f"the reference store {path} belongs to {what} {old}, this job has {new}; "
                "give the job a folder of its own, or delete the store"
            )
    return found


def _reopened(path: Path, manifest: Manifest) -> Manifest:
    """Forget the checksums of files that are not there: they will be computed anew, and another
    machine may round the last digit otherwise."""
    if has_all_files(path, manifest):
        return manifest
    shards = tuple(
        shard if shard_path(path, number).exists() else replace(shard, sha256=None)
        for number, shard in enumerate(manifest.shards)
    )
    return replace(manifest, shards=shards, index_sha256=None)


def _require_partition(shard_rows: Sequence[Sequence[int]], num_samples: int) -> None:
    if sorted(row for rows in shard_rows for row in rows) != list(range(num_samples)):
        raise ValueError(
            f"the shards must hold each of the {num_samples} samples of the index exactly once"
        )
