"""A checksum of a file, by which it is known again."""

from __future__ import annotations

import hashlib
from pathlib import Path


def checksum_of(path: Path) -> int:
    """Return a signed 64-bit hash over a file's bytes, which are read in small parts."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).digest()
    return int.from_bytes(digest, "little", signed=True)
