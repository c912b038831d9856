"""A file of records, how it is read, and what decides the tokens of its samples."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from regate_ds.data.llava.encode import Encoder
from regate_ds.data.llava.parse import Parser

ENCODING = 1
"""Version of how records become tokens; a change that gives other tokens raises it."""


@dataclass(frozen=True)
class Source:
    """One data set before it is read."""

    path: Path
    name: str
    """Name of the data set in the keys of its samples."""

    image_root: Path | None
    """Folder that image names are relative to; None is the folder of the file."""

    encoder: Encoder

    def parser(self, *, verify_images: bool) -> Parser:
        """Make what checks the file's records, with their images opened or only looked up."""
        return Parser(self.path, self.name, self.image_root or self.path.parent, verify_images)

    def stamp(self) -> tuple[int, int]:
        """Return the size and the time of the file, which change when it is written again."""
        found = self.path.stat()
        return found.st_size, found.st_mtime_ns

    def identity(self) -> dict[str, Any]:
        """Return what decides the index, as JSON can hold it."""
        settings = self.encoder.settings()
        size, time = self.stamp()
        return {
            **settings,
            "tokenizer": hashlib.sha256(settings["tokenizer"].encode()).hexdigest(),
            "tokenizers": tokenizers.__version__,
            "encoding": ENCODING,
            "path": str(self.path.resolve()),
            "size": size,
            "time_ns": time,
            "name": self.name,
            "image_root": str((self.image_root or self.path.parent).resolve()),
        }

    def entry_name(self) -> str:
        """Return the name of the folder that holds this data set's cache; it differs where the
        identity does."""
        text = json.dumps(self.identity(), sort_keys=True)
        return f"{self.path.name[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
