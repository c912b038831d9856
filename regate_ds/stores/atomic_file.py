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
        _sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            # Of a full disk the system's own error names no file.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def make_folder(path: Path) -> None:
    """Make a folder and those above it, durably."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in made:
        _sync(folder.parent)


def sync_files(folder: Path) -> None:
    """Make durable what other libraries have written into a folder, at any depth."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        _sync(path)


def _sync(path: Path) -> None:
    """fsync; of a folder it makes new names in it durable, which that of a file does not cover."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
