"""What all stores on disk share: their errors, and files that tell a changed byte.

A manifest ends with its own checksum. Any other file has its checksum in the manifest or at its own
end (``shard_file.py``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Verify = Literal["quick", "full"]
"""Compare a shard with its checksum when it is first read, or every byte on opening."""

MANIFEST_NAME = "manifest.json"
"""Name of the file that says what a store holds."""


@dataclass(frozen=True, kw_only=True)
class StoreKind:
    """What errors call a store, and how it is computed."""

    name: str
    command: str
    """The command that computes it."""

    call: str
    """The function of the library that does."""

    format: int
    """Version of the manifest and of the shard files."""

    mark: str
    """A key that the manifests of this kind alone have."""

    def damaged(self, path: Path, fault: str) -> ValueError:
        """Make the error for a file whose content is wrong."""
        return ValueError(
            f"{path} is damaged: {fault}; restore it from a copy, or delete it and run "
            f"`{self.command}` again"
        )

    def missing(self, path: Path) -> ValueError:
        """Make the error for a file that the manifest names and the folder lacks."""
        return ValueError(
            f"{path} is missing, so the {self.name} is incomplete; restore it from a copy, or run "
            f"`{self.command}` again"
        )

    def unfinished(self, store: Path, num_missing: int, num_shards: int) -> ValueError:
        """Make the error for a store that lacks shards, or the checksums of them."""
        return ValueError(
            f"the {self.name} {store} is not finished ({num_missing} of {num_shards} "
            f"shards are still to compute); run `{self.command}` again: it goes on where it stopped"
        )

    def content_of(self, path: Path, sha256: str) -> bytes:
        """Return the bytes of a file. ``ValueError`` if it is missing or has another hash."""
        self.require_content(path, sha256)
        return path.read_bytes()

    def require_content(self, path: Path, sha256: str) -> None:
        """Refuse, by ``ValueError``, a file that is missing or has another hash."""
        if not path.is_file():
            raise self.missing(path)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise self.damaged(path, "its bytes do not match the checksum in the manifest")

    def load_fields(self, store: Path, name: str = MANIFEST_NAME) -> dict[str, Any]:
        """Read the fields of a manifest. ``ValueError`` names the file if it is missing, damaged or
        of another format."""
        path, ways = store / name, f"({self.command} CONFIG, or {self.call})"
        if not path.is_file():
            raise ValueError(f"{store} is not a {self.name} (it has no {name}); compute one {ways}")
        content = path.read_bytes()
        try:
            fields = json.loads(content)
        except ValueError as error:
            raise self.damaged(path, f"it is not JSON ({error})") from error
        if not isinstance(fields, dict) or sealed(fields) != content:
            raise self.damaged(path, "its text does not match its checksum")
        if self.mark not in fields:
            raise ValueError(f"{store} is a store of another kind, not a {self.name} {ways}")
        if fields["format"] != self.format:
            raise ValueError(
                f"{path} has store format {fields['format']}, this version reads {self.format}; "
                f"make it anew in an empty folder {ways}"
            )
        return {key: value for key, value in fields.items() if key != "sha256"}

    def holds(self, store: Path, shards: str) -> bool:
        """Return whether the folder holds a store. ValueError if it holds shards alone, which are
        files of the form ``shards``."""
        if (store / MANIFEST_NAME).exists():
            return True
        if any(store.glob(shards)):
            raise ValueError(
                f"{store} holds shards but no {MANIFEST_NAME}, which says what they are of; "
                "restore it from a copy, or delete the folder"
            )
        return False

    def require_there(self, manifest: Path) -> None:
        """Refuse to write if the store is gone: its folder was removed, or its disk unmounted."""
        if not manifest.is_file():
            raise FileNotFoundError(
                f"the {self.name} {manifest.parent} has vanished while it was written (it has no "
                f"{manifest.name} any more); check the disk, then run the job again"
            )

    def require_same(
        self, store: Path, what: str, old: object, new: object, rest: str = ""
    ) -> None:
        """Refuse, by ``ValueError``, a job for something else than the store is of."""
        if old != new:
            raise ValueError(
                f"the {self.name} {store} belongs to {what} {old}, this job has {new}"
                f"{rest}; or give the job a folder of its own, or delete the store"
            )

    def require_setting(self, store: Path, key: str, begun: object, asked: object) -> None:
        """Refuse, by ``ValueError``, to go on with another value than the store was begun with."""
        if begun != asked:
            raise ValueError(
                f"the {self.name} {store} was begun with {key}={begun}, this "
                f"job has {asked}; use the value that it was begun with, or delete the store"
            )


def sealed(fields: Mapping[str, Any]) -> bytes:
    """Return the fields as JSON, with the checksum of the others as the last field."""
    content = {name: value for name, value in fields.items() if name != "sha256"}
    checksum = hash_of(json.dumps(content).encode())
    return json.dumps({**content, "sha256": checksum}).encode() + b"\n"


def hash_of(*parts: bytes) -> str:
    """Return the SHA-256 of the joined parts as hexadecimal digits."""
    return hashlib.sha256(b"".join(parts)).hexdigest()
