"""A file appears whole or not at all, also when the job is killed or the power fails."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"
"""Ends the name of a file that is being written; one left behind by a killed job may be deleted."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` beside ``path``, make it durable, then give it its name in one step."""
    # The name is unique, because ranks of one job may write the same file (with equal content).
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            # Of a full disk the system's own error names no file.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the new name durable: fsync of the file alone does not cover its folder's entry."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
