"""A file or folder of records, how it is read, and what decides the tokens of its samples."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from regate_ds.data.interfaces import RecordEncoder
from regate_ds.data.llava.parse import Parser
from regate_ds.data.llava.raw import data_files, image_root_of

ENCODING = 1
"""Version of how records become tokens; a change that gives other tokens raises it."""


@dataclass(frozen=True)
class Source:
    """One data set before it is read."""

    path: Path
    name: str
    """Name of the data set in the keys of its samples."""

    image_root: Path | None
    """Folder that image names are relative to; None is the folder of the data."""

    encoder: RecordEncoder
    video_frames: int | None = None
    """Number of frames to take from a video that is a file."""

    def parser(self, *, verify_images: bool) -> Parser:
        """Make what checks the file's records, with their images opened or only looked up."""
        return Parser(
            self.path,
            self.name,
            self._root,
            verify_images,
            "whole" if self.encoder.takes_videos else self.video_frames,
        )

    def stamp(self) -> str:
        """Return a name of the files' names, sizes and times, which change with the data."""
        found = [(path, path.stat()) for path in data_files(self.path)]
        files = [
            [str(path.relative_to(self.path.parent)), each.st_size, each.st_mtime_ns]
            for path, each in found
        ]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """Return what decides the index, as JSON can hold it."""
        settings = self.encoder.settings()
        return {
            **settings,
            "tokenizer": hashlib.sha256(settings["tokenizer"].encode()).hexdigest(),
            "tokenizers": tokenizers.__version__,
            "encoding": ENCODING,
            "path": str(self.path.resolve()),
            "files": self.stamp(),
            "name": self.name,
            "image_root": str(self._root.resolve()),
            "video_frames": self.video_frames,
        }

    @property
    def _root(self) -> Path:
        return self.image_root or image_root_of(self.path)

    def entry_name(self) -> str:
        """Return the name of the folder that holds this data set's cache; it differs where the
        identity does."""
        text = json.dumps(self.identity(), sort_keys=True)
        name = self.path.name.encode()[:100].decode(errors="ignore")
        return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
