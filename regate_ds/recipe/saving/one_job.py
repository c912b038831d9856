"""One job at a time in a run folder: two would mix their checkpoints and figures in silence."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from regate_ds.stores.atomic_file import make_folder

LOCK = ".lock"
"""Name of the file in a run folder that the job which holds it has locked."""

PATIENCE = 100
"""Seconds to wait for another job's end. A file server takes a lost node's lock back after 90."""

_LOOK_AGAIN_SECONDS = 0.5

_HELD = (errno.EACCES, errno.EAGAIN)

_GONE = (errno.ENOENT, errno.ESTALE)
"""Numbers of the errors for a file that its last holder has deleted, here or on a file server."""

_LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def only_job(folder: Path, *, is_first: bool) -> Iterator[None]:
    """Hold a run folder during the block; only the first rank does.

    ValueError if another job still holds it after PATIENCE seconds. The system takes the lock from
    a process that is killed. Where the file system has no locks, that is said.
    """
    if not is_first:
        yield
        return
    make_folder(folder)
    handle = _lock(folder)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(handle)


def _lock(folder: Path) -> int:
    """Return the open lock file. Unlike flock's, this lock is not passed on to child processes."""
    path, start, is_told = folder / LOCK, time.monotonic(), False
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _LOCKLESS:
                print(f"{folder} has no locks ({error.strerror}): a second job would not be told")
                return handle
            if error.errno not in (*_HELD, *_GONE):
                raise
        else:
            if _is_there(handle, path):
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return handle
        holder = os.pread(handle, 200, 0).decode(errors="replace")
        os.close(handle)
        if not is_told:
            print(f"run.out={folder} is in use ({holder}): waiting {PATIENCE} s for its end")
            is_told = True
        if time.monotonic() - start > PATIENCE:
            raise ValueError(
                f"run.out={folder} is in use by another job ({holder}); wait for its end, or "
                "choose another folder"
            )
        time.sleep(_LOOK_AGAIN_SECONDS)


def _is_there(handle: int, path: Path) -> bool:
    """Return whether the open file is still the one of that name: its last holder deletes it."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return False
