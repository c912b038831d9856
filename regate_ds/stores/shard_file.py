"""A file of numbers that ends with a SHA-256 (32 bytes).

The checksum covers a hash of what the numbers are of, and then the numbers. So a file that is of
something else is refused, even if it has the same size and numbers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from regate_ds.stores.atomic_file import write_atomically
from regate_ds.stores.kind import StoreKind

_CHECKSUM_BYTES = 32


@dataclass(frozen=True)
class ShardFile:
    """One shard of a store, as its manifest describes it."""

    kind: StoreKind
    path: Path
    num_bytes: int
    """Size of the numbers."""

    subject: str
    """Hash of what the numbers are of, as hexadecimal digits."""

    sha256: str | None
    """The checksum, as the manifest has it; None if it does not know it yet."""

    def write(self, numbers: bytes) -> None:
        """Write the file, atomically."""
        write_atomically(self.path, numbers + self._checksum(numbers))

    def open(self) -> np.ndarray:
        """Open the file as memory-mapped uint8; only its last 32 bytes are read.

        ``ValueError`` names the file and the fault if its size, or the checksum at its end, is not
        the one in the manifest.
        """
        if not self.path.is_file():
            raise self.kind.missing(self.path)
        num_bytes, expected = self.path.stat().st_size, self.num_bytes + _CHECKSUM_BYTES
        if num_bytes != expected:
            raise self.kind.damaged(self.path, f"it has {num_bytes} bytes instead of {expected}")
        content = np.memmap(self.path, dtype=np.uint8, mode="r")
        if self.sha256 not in (None, _checksum_of(content)):
            raise self.kind.damaged(
                self.path,
                f"its checksum is {_checksum_of(content)}, the manifest's is {self.sha256}",
            )
        return content

    def checked(self, content: np.ndarray) -> np.ndarray:
        """Return the numbers of the open file as uint8, after checking every byte.

        ``ValueError`` names the file.
        """
        numbers = content[:-_CHECKSUM_BYTES]
        if self._checksum(numbers.data).hex() != _checksum_of(content):
            raise self.kind.damaged(self.path, "its values are not what was written for it")
        return np.asarray(numbers)

    def check(self) -> str:
        """Check every byte of the file, and return its checksum as hexadecimal digits."""
        content = self.open()
        self.checked(content)
        return _checksum_of(content)

    def _checksum(self, numbers: bytes | memoryview) -> bytes:
        digest = hashlib.sha256(bytes.fromhex(self.subject))
        digest.update(numbers)
        return digest.digest()


def _checksum_of(content: np.ndarray) -> str:
    return content[-_CHECKSUM_BYTES:].tobytes().hex()
