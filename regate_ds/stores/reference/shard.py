"""One shard file of a reference store: little-endian fp16 values, then a SHA-256 (32 bytes).

The checksum covers ``Shard.samples`` and then the values. So a file of other samples or of another
teacher is refused, even if it has the same size and values.

Values are negative log-likelihoods in nats. The relative error of fp16 is at most 2**-11 from
2**-14 up, its absolute error at most 2**-25 below; a loss above 65504 is refused. Shapes: N label
positions of the shard's samples, R rows of the index.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from torch import Tensor

from regate_ds.stores.atomic_file import write_atomically
from regate_ds.stores.reference.manifest import Shard, damaged, hash_of, missing_file

LARGEST = 65504.0
"""Largest finite fp16 number, in nats."""

_CHECKSUM_BYTES = 32

VALUE = np.dtype("<f2")


def describe_samples(teacher_id: str, tokens_per_batch: int, digests_R2: Tensor) -> str:
    """Hash what a shard's values depend on; the result is ``Shard.samples``."""
    header = f"{teacher_id}\n{tokens_per_batch}\n".encode()
    return hash_of(header, digests_R2.numpy().astype("<i8").tobytes())


def write_shard(path: Path, shard: Shard, values_N: Tensor) -> None:
    """Round the values to fp16 and write the file, atomically."""
    stored = values_N.detach().cpu().numpy().astype(VALUE).tobytes()
    write_atomically(path, stored + _checksum(shard, stored))


def open_shard(path: Path, shard: Shard) -> np.ndarray:
    """Open a shard as memory-mapped uint8; only its last 32 bytes are read.

    ``ValueError`` names the file and the fault if its size, or the checksum at its end, is not the
    one in the manifest.
    """
    if not path.is_file():
        raise missing_file(path)
    num_bytes, expected = path.stat().st_size, shard.num_values * VALUE.itemsize + _CHECKSUM_BYTES
    if num_bytes != expected:
        raise damaged(path, f"it has {num_bytes} bytes instead of {expected}")
    content = np.memmap(path, dtype=np.uint8, mode="r")
    if shard.sha256 not in (None, checksum_of(content)):
        raise damaged(
            path, f"its checksum is {checksum_of(content)}, the manifest's is {shard.sha256}"
        )
    return content


def checked_values(content: np.ndarray, path: Path, shard: Shard) -> np.ndarray:
    """Return fp16 [N] of an open shard, after checking every byte against its checksum.

    ``ValueError`` names the file.
    """
    stored = content[:-_CHECKSUM_BYTES]
    if _checksum(shard, stored.data).hex() != checksum_of(content):
        raise damaged(path, "its values are not what was written for these samples")
    return np.asarray(stored).view(VALUE)


def checksum_of(content: np.ndarray) -> str:
    """Return the checksum at the end of an open shard as hexadecimal digits."""
    return content[-_CHECKSUM_BYTES:].tobytes().hex()


def _checksum(shard: Shard, stored: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(bytes.fromhex(shard.samples))
    digest.update(stored)
    return digest.digest()
