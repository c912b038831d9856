"""The files that difficulty is saved in beside a checkpoint: one for each data rank."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from regate_ds.stores.atomic_file import write_atomically

COLUMN = "column."
"""What the names of columns begin with in a file."""


DIFFICULTY = {"difficulty": 0.0}
"""The paper's one column: the moving average of the loss, 0 before the first sight."""


def require_columns(saved: Mapping[str, Any], columns: Mapping[str, Any], path: Path) -> None:
    """Refuse a file with other columns than the run's score reads."""
    found = sorted(name.removeprefix(COLUMN) for name in saved if name.startswith(COLUMN))
    if found != sorted(columns):
        raise ValueError(
            f"{path} has the statistics {found}, this run's score needs {sorted(columns)}; resume "
            "with the score that the run was started with"
        )


def write_sidecar(path: Path, arrays: dict[str, Any]) -> None:
    """Write one npz file, atomically, into a folder that is made if it is missing."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def find_sidecars(folder: Path, num_ranks: int | None, *, stem: str) -> list[Path]:
    """Return the files of all ranks of one save, by rank; ``stem``: what their names begin with."""
    pattern = re.compile(rf"{stem}-(\d+)-of-(\d+)\.npz")
    names = sorted(path.name for path in folder.glob(f"{stem}-*-of-*.npz"))
    sizes = sorted({int(match[2]) for name in names if (match := pattern.fullmatch(name))})
    sizes = sizes if num_ranks is None else [num_ranks]
    if len(sizes) > 1:
        raise ValueError(
            f"{folder} holds difficulty files of several saves (by {sizes} ranks); "
            "delete the older ones"
        )
    expected = [f"{stem}-{rank}-of-{size}.npz" for size in sizes for rank in range(size)]
    missing = [name for name in expected if name not in names]
    if missing or not expected:
        raise ValueError(
            f"{folder} lacks {', '.join(missing) or f'{stem}-*-of-*.npz'}; a run is resumed "
            "from a checkpoint that all of its data ranks saved"
        )
    return [folder / name for name in expected]


def require_one_moment(moments: dict[str, int], folder: Path) -> int:
    """Return the number of writes that all files of a save agree on."""
    if len(set(moments.values())) > 1:
        raise ValueError(
            f"the difficulty files in {folder} are of different moments (number of writes: "
            f"{moments}); the save was cut short, resume from an older checkpoint"
        )
    return next(iter(moments.values()))


def read_sidecar(path: Path, version: int) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            saved = {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"cannot read the difficulty file {path}: {error}; resume from an older checkpoint"
        ) from error
    if (found := int(saved.get("format", 0))) != version:
        raise ValueError(
            f"{path} has difficulty format {found}, this version reads {version}; start the run "
            "anew (regate train CONFIG, with another run.out)"
        )
    return saved
