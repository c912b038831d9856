"""The teacher's losses on disk: computed once, only read while training.

A store is a folder:

    manifest.json     what it holds: see ``Manifest``
    index.npz         the AnswerIndex: whose values these are, and how many
    shard-00000.fp16  the values of a fixed list of samples, one sample after the other, as
                      little-endian fp16, and then the SHA-256 (32 bytes) of those values

Values are negative log-likelihoods in nats. Rounding to fp16 costs a relative 2**-11 at most from
2**-14 up, and an absolute 2**-25 at most below; beyond 65504 nothing is stored (see
``reference_writer``). Shapes: N label positions of the samples asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regate_ds.algorithm.batch import SampleKey
from regate_ds.data.answer_index import AnswerIndex

FORMAT = 1
"""Version of the manifest and of the shard files."""

MANIFEST_NAME, INDEX_NAME = "manifest.json", "index.npz"

DIGEST_BYTES = 32

VALUE = np.dtype("<f2")


@dataclass(frozen=True)
class Shard:
    """One file of a store."""

    rows: tuple[int, ...]
    """Rows of the answer index, in the order of their values in the file."""

    num_values: int

    sha256: str | None = None
    """Of the values, as hexadecimal digits; None until the store is finished, and again where a
    shard is computed anew."""


@dataclass(frozen=True)
class Manifest:
    """What a store holds."""

    fingerprint: str
    """Of the answer index: the data that the values belong to."""

    teacher_id: str
    shards: tuple[Shard, ...]

    index_sha256: str | None = None
    """Of the index file; None until the store is finished."""

    format: int = FORMAT

    @property
    def is_finished(self) -> bool:
        return self.index_sha256 is not None

    @property
    def plan(self) -> Manifest:
        """The same store before any shard was computed."""
        shards = tuple(replace(shard, sha256=None) for shard in self.shards)
        return replace(self, shards=shards, index_sha256=None)

    def to_bytes(self) -> bytes:
        """JSON that ends with its own checksum, so that a flipped byte in it is found as well."""
        return _sealed(asdict(self))

    @classmethod
    def load(cls, store: Path) -> Manifest:
        """Read a store's manifest. One that is missing or damaged is a ``ValueError`` naming it."""
        path = store / MANIFEST_NAME
        if not path.is_file():
            raise ValueError(
                f"{store} is not a reference store (it has no {MANIFEST_NAME}); "
                "compute one with `regate teacher`"
            )
        content = path.read_bytes()
        try:
            fields = json.loads(content)
        except ValueError as error:
            raise damaged(path, f"it is not JSON ({error})") from error
        if not isinstance(fields, dict) or _sealed(fields) != content:
            raise damaged(path, "its text does not match its checksum")
        if fields["format"] != FORMAT:
            raise ValueError(
                f"{path} has store format {fields['format']}, this version reads {FORMAT}; "
                "compute the store again"
            )
        shards = tuple(
            Shard(tuple(shard["rows"]), shard["num_values"], shard["sha256"])
            for shard in fields["shards"]
        )
        return cls(fields["fingerprint"], fields["teacher_id"], shards, fields["index_sha256"])


class ReferenceStore:
    """Reference losses of a data set, memory-mapped. Every byte is checked on opening."""

    def __init__(self, path: Path | str) -> None:
        """Open a finished store. What is missing or damaged is a ``ValueError`` naming it."""
        self.path = Path(path)
        self._manifest = Manifest.load(self.path)
        self._require_finished()
        self.index = self._load_index()
        self._shards = [
            read_shard(shard_path(self.path, number), shard)
            for number, shard in enumerate(self._manifest.shards)
        ]
        self._place = self._find_places()

    @property
    def fingerprint(self) -> str:
        return self._manifest.fingerprint

    @property
    def teacher_id(self) -> str:
        return self._manifest.teacher_id

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
        places = [self._place[row] for row in self.index.rows(keys)]
        parts = [self._shards[shard][start:end] for shard, start, end in places]
        # The empty array gives a window without samples a type.
        values_N = np.concatenate([np.empty(0, VALUE), *parts]).astype(np.float32)
        return torch.from_numpy(values_N)

    def _require_finished(self) -> None:
        if self._manifest.is_finished:
            return
        shards = self._manifest.shards
        missing = [n for n in range(len(shards)) if not shard_path(self.path, n).exists()]
        raise ValueError(
            f"the reference store {self.path} is not finished ({len(missing)} of {len(shards)} "
            "shards are still to compute); run `regate teacher` again, it goes on where it stopped"
        )

    def _load_index(self) -> AnswerIndex:
        path = self.path / INDEX_NAME
        if not path.is_file():
            raise missing_file(path)
        if hash_file(path) != self._manifest.index_sha256:
            raise damaged(path, "its bytes do not match the checksum in the manifest")
        return AnswerIndex.load(path)

    def _find_places(self) -> list[tuple[int, int, int]]:
        """For each row: its shard, and where its values start and end in it."""
        places = [(-1, 0, 0)] * self.index.num_samples
        num_labels = self.index.num_labels.tolist()
        for number, shard in enumerate(self._manifest.shards):
            start = 0
            for row in shard.rows:
                places[row] = (number, start, start + num_labels[row])
                start += num_labels[row]
        return places


def shard_path(store: Path, number: int) -> Path:
    return store / f"shard-{number:05d}.fp16"


def read_shard(path: Path, shard: Shard) -> np.ndarray:
    """Map a shard's values after comparing every byte with the file's own checksum and, once the
    store is finished, with the manifest's. A ``ValueError`` names the file and the fault."""
    if not path.is_file():
        raise missing_file(path)
    num_bytes, expected = path.stat().st_size, shard.num_values * VALUE.itemsize + DIGEST_BYTES
    if num_bytes != expected:
        raise damaged(path, f"it has {num_bytes} bytes instead of {expected}")
    content = np.memmap(path, dtype=np.uint8, mode="r")
    stored, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:].tobytes()
    found = hashlib.sha256(stored.data).digest()
    if found != digest or shard.sha256 not in (None, found.hex()):
        raise damaged(path, f"its values have SHA-256 {found.hex()}, not what was written")
    return np.asarray(stored).view(VALUE)


def hash_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def damaged(path: Path, fault: str) -> ValueError:
    return ValueError(
        f"{path} is damaged: {fault}; restore it from a copy, or delete it and run "
        "`regate teacher` again"
    )


def missing_file(path: Path) -> ValueError:
    return ValueError(
        f"{path} is missing, the reference store is incomplete; restore it from a copy, or run "
        "`regate teacher` again"
    )


def _sealed(fields: dict[str, Any]) -> bytes:
    """The fields as JSON, the last of them the checksum of the others."""
    content = {name: value for name, value in fields.items() if name != "sha256"}
    checksum = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": checksum}).encode() + b"\n"
