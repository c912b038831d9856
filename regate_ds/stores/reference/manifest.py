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

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

STORE_FORMAT = 2
"""Version of the manifest and of the shard files."""

MANIFEST_NAME, APPEND_NAME = "manifest.json", "append.json"


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
    format: int = STORE_FORMAT

    @property
    def is_finished(self) -> bool:
        """Whether every shard is computed and has its checksum here."""
        return all(shard.sha256 is not None for shard in self.shards)

    def to_bytes(self) -> bytes:
        """Return JSON that ends with its own checksum, so that a changed byte is found."""
        return _sealed(asdict(self))

    @classmethod
    def load(cls, store: Path, name: str = MANIFEST_NAME) -> Manifest:
        """Read a store's manifest. ``ValueError`` names the file if it is missing or damaged."""
        path = store / name
        if not path.is_file():
            raise ValueError(
                f"{store} is not a reference store (it has no {name}); "
                "compute one (regate teacher CONFIG, or score_dataset)"
            )
        content = path.read_bytes()
        try:
            fields = json.loads(content)
        except ValueError as error:
            raise damaged(path, f"it is not JSON ({error})") from error
        if not isinstance(fields, dict) or _sealed(fields) != content:
            raise damaged(path, "its text does not match its checksum")
        if fields["format"] != STORE_FORMAT:
            raise ValueError(
                f"{path} has store format {fields['format']}, this version reads {STORE_FORMAT}; "
                "make it anew in an empty folder (regate teacher CONFIG, or score_dataset)"
            )
        del fields["sha256"]
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


def content_of(path: Path, sha256: str) -> bytes:
    """Return the bytes of a file. ``ValueError`` names it if it is missing or has another hash."""
    if not path.is_file():
        raise missing_file(path)
    content = path.read_bytes()
    if hash_of(content) != sha256:
        raise damaged(path, "its bytes do not match the checksum in the manifest")
    return content


def hash_of(*parts: bytes) -> str:
    """Return the SHA-256 of the joined parts as hexadecimal digits."""
    return hashlib.sha256(b"".join(parts)).hexdigest()


def damaged(path: Path, fault: str) -> ValueError:
    """Make the error for a file whose content is wrong."""
    return ValueError(
        f"{path} is damaged: {fault}; restore it from a copy, or delete it and run "
        "`regate teacher` again"
    )


def missing_file(path: Path) -> ValueError:
    """Make the error for a file that the manifest names and the folder lacks."""
    return ValueError(
        f"{path} is missing, so the reference store is incomplete; restore it from a copy, or run "
        "`regate teacher` again"
    )


def starts_of(sizes: Sequence[int]) -> list[int]:
    """Return the start of each part if they lie one after the other, and the end of the last."""
    return list(accumulate(sizes, initial=0))


def _sealed(fields: dict[str, Any]) -> bytes:
    """Return the fields as JSON, with the checksum of the others as the last field."""
    content = {name: value for name, value in fields.items() if name != "sha256"}
    checksum = hash_of(json.dumps(content).encode())
    return json.dumps({**content, "sha256": checksum}).encode() + b"\n"
