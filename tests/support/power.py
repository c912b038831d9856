"""A disk of which only what was made durable is left when the power fails.

Contents last once the file was synced, names in a folder once the folder was; the rest may be lost
or not. After the failure no call on the disk succeeds, so that nothing cleans up either.
"""

from __future__ import annotations

import builtins
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regate_ds.stores import atomic_file


class PowerFailure(BaseException):
    pass


class Disk:
    """Records what is durable below a folder; fails at a given step, 0 being the first."""

    def __init__(self, root: Path, monkeypatch: Any, fail_at: int | None = None) -> None:
        self.root, self.num_steps, self._fail_at = root, 0, fail_at
        self._content: dict[int, bytes] = {}
        self._names: dict[Path, dict[str, int]] = {}
        for folder in (root, *(p for p in root.rglob("*") if p.is_dir())):
            self._note_names(folder)
        for file in (p for p in root.rglob("*") if p.is_file()):
            self._content[file.stat().st_ino] = file.read_bytes()
        for name in ("replace", "unlink", "mkdir"):
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))
        monkeypatch.setattr(os, "fsync", self._counted(self._fsync))
        monkeypatch.setattr(atomic_file, "open", self._counted(builtins.open), raising=False)

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> Any:
            if self._fail_at is not None and self.num_steps >= self._fail_at:
                raise PowerFailure
            self.num_steps += 1
            return call(*args, **options)

        return step

    def _fsync(self, handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.is_dir():
            self._note_names(path)
        else:
            self._content[path.stat().st_ino] = path.read_bytes()

    def _note_names(self, folder: Path) -> None:
        self._names[folder] = {path.name: path.stat().st_ino for path in folder.iterdir()}

    def after_power_failure(self, place: Path, *, keeps_names: bool) -> Path:
        """A copy as the next start finds it: with all names or only the durable ones; of a content
        that was not synced, half."""
        where = {p.stat().st_ino: p for p in (self.root, *self.root.rglob("*"))}
        self._rebuild(self.root, place, where, keeps_names)
        return place

    def _rebuild(self, folder: Path, into: Path, where: dict[int, Path], keeps_names: bool) -> None:
        into.mkdir()
        names = self._names.get(folder, {})
        if keeps_names:
            names = {path.name: path.stat().st_ino for path in folder.iterdir()}
        for name, inode in names.items():
            if (found := where.get(inode)) is not None and found.is_dir():
                self._rebuild(found, into / name, where, keeps_names)
                continue
            content = self._content.get(inode)
            if content is None:
                written = found.read_bytes() if found is not None else b""
                content = written[: len(written) // 2]
            (into / name).write_bytes(content)


def copy_of(folder: Path, place: Path) -> Path:
    shutil.copytree(folder, place)
    return place
