"""Write files so that they appear whole or not at all, even if the job is killed or power fails."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"
"""Suffix of a file that is being written. One that a killed job left behind may be deleted."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to a temporary file, make it durable, then rename it to ``path``.

    OSError names ``path``.
    """
    # The name is unique, because ranks of one job may write the same file (with equal content).
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            # The system's own error for a full disk names no file.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, durably."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _sync(folder.parent)


def sync_files(folder: Path) -> None:
    """Make all files of a folder durable, at any depth, which other libraries may have written."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        _sync(path)


def _sync(path: Path) -> None:
    """Make a file's content durable by fsync, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
