"""What a reference store holds, and the names of its files.

    manifest.json        see ``Manifest``
    index-....npz        the AnswerIndex: which samples have values, and how many each
    rows-....npy         rows of that index in the order of their values, shard by shard
    shard-00000.fp16     the values of one shard's samples: see shard.py
    append.json          only while samples are added: the manifest of the longer store

The SHA-256 of the index and of the rows is in their names. So the files of a store and of the
longer store that it grows into can lie side by side, and the manifest says which of them count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from regate_ds.algorithm.scores.score import Column
from regate_ds.stores.kind import MANIFEST_NAME, StoreKind, sealed

REFERENCE = StoreKind(
    name="reference store",
    command="regate teacher",
    call="score_dataset",
    format=2,
    mark="teacher_id",
)

APPEND_NAME = "append.json"


@dataclass(frozen=True)
class Shard:
    """The manifest's entry for one file of values."""

    num_rows: int
    """Number of samples."""

    num_values: int
    """Number of label positions of these samples."""

    tokens_per_batch: int
    """The job's batch limit; with the order of the rows it decides which samples form a batch."""

    samples: str
    """Hash over the teacher, ``tokens_per_batch`` and the samples' digests, in order."""

    sha256: str | None = None
    """Checksum of ``samples`` and the values; None until the store is finished, and while a shard
    is computed again."""


@dataclass(frozen=True)
class Manifest:
    """What a store holds."""

    fingerprint: str
    """Fingerprint of the answer index, and so of the data that the values belong to."""

    teacher_id: str
    """Name of the teacher whose losses these are."""

    index_sha256: str
    rows_sha256: str
    shards: tuple[Shard, ...]
    format: int = REFERENCE.format
    column: Column = "text"
    """What the values are. The file of a text-only teacher's losses does not have this line, as
    those of older versions."""

    @property
    def is_finished(self) -> bool:
        """Whether every shard is computed and has its checksum here."""
        return all(shard.sha256 is not None for shard in self.shards)

    def to_bytes(self) -> bytes:
        """Return JSON that ends with its own checksum, so that a changed byte is found."""
        fields: dict[str, Any] = asdict(self)
        if self.column == "text":
            del fields["column"]
        return sealed(fields)

    @classmethod
    def load(cls, store: Path, name: str = MANIFEST_NAME) -> Manifest:
        """Read a store's manifest. ``ValueError`` names the file if it is missing or damaged."""
        fields = REFERENCE.load_fields(store, name)
        return cls(**{**fields, "shards": tuple(Shard(**shard) for shard in fields["shards"])})


def index_path(store: Path, manifest: Manifest) -> Path:
    return store / f"index-{manifest.index_sha256[:16]}.npz"


def rows_path(store: Path, manifest: Manifest) -> Path:
    return store / f"rows-{manifest.rows_sha256[:16]}.npy"


def shard_path(store: Path, number: int) -> Path:
    return store / f"shard-{number:05d}.fp16"


def files_of(store: Path, manifest: Manifest) -> list[Path]:
    """Return the paths of all files that a manifest names: index, rows and shards."""
    shards = [shard_path(store, number) for number in range(len(manifest.shards))]
    return [index_path(store, manifest), rows_path(store, manifest), *shards]


def starts_of(sizes: Sequence[int]) -> list[int]:
    """Return the start of each part if they lie one after the other, and the end of the last."""
    return list(accumulate(sizes, initial=0))
