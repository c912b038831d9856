"""The raw records of shards, by number. Shapes: R records.

A place counts through all shards, as if they were one file: so it is two numbers, as in a file.
"""

from __future__ import annotations

import os
from array import array
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from regate_ds.data.shards.folder import TAR, data_shards, folder_of_shards, left_out, read_index
from regate_ds.data.shards.mds import read_mds_sample, samples_in_mds
from regate_ds.data.shards.tar import read_tar_sample, samples_in_tar


def find_samples(path: Path) -> np.ndarray:
    """Return int64 [R, 2]: the first byte of each record, and the byte after its last one.

    Of tar files it reads the headers. ValueError names a shard that cannot be read.
    """
    places, base, gone = array("q"), 0, left_out(path)
    for shard in data_shards(path):
        inside = shard.relative_to(folder_of_shards(path)).as_posix()
        samples = samples_in_tar(shard) if shard.suffix == TAR else samples_in_mds(shard)
        for name, start, end in samples:
            if not gone or f"{inside}/{name}" not in gone:
                places.extend((base + start, base + end))
        base += shard.stat().st_size
    if not places:
        raise ValueError(f"{path} has shards without samples; give some")
    return np.frombuffer(places, dtype=np.int64).reshape(-1, 2)


class ShardRecords:
    """The raw records of shards, each read when it is asked for."""

    def __init__(self, path: Path, places: np.ndarray) -> None:
        """places: int64 [R, 2], as ``find_samples`` returns them, or those of some records."""
        self.path, self._places = path, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Any:
        """Return a record; in place of one that cannot be read, its Cause."""
        start, end = self._places[number].tolist()
        files, ends = self._shards
        which = int(np.searchsorted(ends, start, side="right"))
        begin = start - (int(ends[which - 1]) if which else 0)
        # Opened anew each time: a data set may have more shards than a process may have files.
        handle = os.open(files[which], os.O_RDONLY)
        try:
            content = os.pread(handle, end - start, begin)
        finally:
            os.close(handle)
        if files[which].suffix == TAR:
            return read_tar_sample(content)
        return read_mds_sample(content, self._columns[files[which].name])

    @cached_property
    def _columns(self) -> dict[str, dict[str, Any]]:
        return read_index(self.path)

    @cached_property
    def _shards(self) -> tuple[list[Path], np.ndarray]:
        files = data_shards(self.path)
        return files, np.cumsum([file.stat().st_size for file in files])
