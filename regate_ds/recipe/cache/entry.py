"""Open a data set by its cache, which is built where no folder holds it yet.

A finished cache never changes: other bytes of the file or other settings have another name. It
appears by one rename, so a killed build leaves nothing that looks finished, and of two builds at
once the first to end stays. Ranks and jobs that start together wait for the one that builds.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np

from regate_ds.data.llava.lines import Records, has_become_bad
from regate_ds.data.llava.raw import open_raw, require_data
from regate_ds.data.llava.records import BadRecord
from regate_ds.data.llava.sample import EncodedSample
from regate_ds.job.ranks import is_first_rank
from regate_ds.recipe.cache.build import BAD_NAME, build
from regate_ds.recipe.cache.source import Source
from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.stores.atomic_file import TEMPORARY_SUFFIX, make_folder, sync_files
from regate_ds.stores.checksums import checksum_of
from regate_ds.stores.index_files import map_column, map_index
from regate_ds.stores.kind import MANIFEST_NAME

_LOOK_AGAIN_SECONDS = 0.2


@dataclass(frozen=True)
class DataSet:
    """The usable records of a file, with what is known of each; everything large is mapped."""

    folder: Path
    """Where its cache lies."""

    source: Source
    records: Records
    index: AnswerIndex
    bad: list[BadRecord]
    """Records that cannot be used: first those bad in the file, then those bad for the student."""

    first_image: np.ndarray
    """int64 [S+1]: the images of row i are ``first_image[i]`` to ``first_image[i+1]``."""

    image_sizes: np.ndarray
    """int32 [I, 2]: width and height of each image."""

    about: dict[str, Any]
    """The manifest."""

    def require_unchanged(self, row: int, sample: EncodedSample) -> None:
        """Refuse, by ValueError naming it, a sample that is not as it was when it was indexed."""
        sizes = self.image_sizes[self.first_image[row] : self.first_image[row + 1]].tolist()
        for image, now, before in zip(sample.images, sample.image_sizes, sizes):
            if list(now) != before:
                raise ValueError(
                    f"image file {image} of {self.source.path}, record {sample.key[1]}, is "
                    f"{now[0]} x {now[1]} pixels, but was {before[0]} x {before[1]} when the data "
                    f"was indexed; {way_out(self.folder)}"
                )
        if not self.index.holds(sample, row):
            raise ValueError(
                f"{self.source.path}, record {sample.key[1]}, has other tokens or images than when "
                f"the data was indexed; {way_out(self.folder)}"
            )

    def has_become_bad(self, bad: BadRecord) -> ValueError:
        """Make the error for a record that could be used when it was indexed."""
        return has_become_bad(bad, way_out(self.folder))


def open_data(source: Source, folders: Sequence[Path]) -> DataSet:
    """Open a data set from the first folder that holds its cache; else build it.

    folders: it is built in the first of them that can be written. If another one is taken than the
    first, that is said. ValueError if the file holds no records, or no folder can be written.
    """
    require_data(source.path)
    name = source.entry_name()
    for folder in folders:
        if is_finished(folder / name):
            return read_entry(source, folder / name)
    folder = _writable(folders, source)
    while not is_finished(folder / name):
        with _only_one(folder, name) as is_mine:
            if is_mine and not is_finished(folder / name):
                _build_into(source, folder, name)
        if not is_mine:
            time.sleep(_LOOK_AGAIN_SECONDS)
    return read_entry(source, folder / name)


def way_out(folder: Path) -> str:
    """Say what to do about data that has changed unseen."""
    return f"restore it, or delete {folder}, so that the data is indexed anew"


def is_finished(entry: Path) -> bool:
    return (entry / MANIFEST_NAME).is_file()


def read_entry(source: Source, entry: Path) -> DataSet:
    """Map the files of a finished cache. ValueError names one that is damaged."""
    try:
        about = json.loads((entry / MANIFEST_NAME).read_text(encoding="utf-8"))
        _require_whole(entry, about, source)
        lines = (entry / BAD_NAME).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{entry} is damaged ({error}); delete the folder") from error
    index = map_index(entry)
    raw = open_raw(source.path, map_column(entry, "places"))
    parser = source.parser(verify_images=False)
    return DataSet(
        folder=entry,
        source=source,
        records=Records(raw, parser, index.keys.record_numbers, way_out(entry)),
        index=index,
        bad=[BadRecord(source.path, *json.loads(line)) for line in lines],
        first_image=map_column(entry, "first_image"),
        image_sizes=map_column(entry, "image_sizes"),
        about=about,
    )


def _require_whole(entry: Path, about: dict[str, Any], source: Source) -> None:
    """Refuse, by ValueError, a cache whose files are not those that were written."""
    for key, value in json.loads(json.dumps(source.identity())).items():
        if about[key] != value:
            raise ValueError(f"{MANIFEST_NAME} has another {key}")
    for name, checksum in about["checksums"].items():
        if checksum_of(entry / name) != checksum:
            raise ValueError(f"{name} has another checksum")


def _writable(folders: Sequence[Path], source: Source) -> Path:
    """Return the first folder that a folder can be made in; say which ones are passed over."""
    faults: list[str] = []
    for folder in folders:
        probe = folder / f".{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
        try:
            make_folder(folder)
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            faults.append(f"{folder} cannot be written ({error.strerror})")
            continue
        if faults and is_first_rank():
            print(f"{'; '.join(faults)}: {source.path} is indexed in {folder}", flush=True)
        return folder
    raise ValueError(
        f"{'; '.join(faults)}: set data.cache to a folder that can, for the index of {source.path}"
    )


@contextmanager
def _only_one(folder: Path, name: str) -> Iterator[bool]:
    """Yield whether this process may build, which no other one does meanwhile.

    The system takes the lock from a process that is killed. Where the file system has no locks,
    several may build, and the first to end stays.
    """
    path = folder / f".{name}.lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        cause = f"{path} cannot be opened ({error.strerror})"
        raise ValueError(f"{cause}; delete it, or set data.cache to another folder") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            print(f"{folder} has no locks ({error.strerror}): each process indexes by itself")
        else:
            for left in folder.glob(f".{escape(name)}.*{TEMPORARY_SUFFIX}"):
                shutil.rmtree(left)
        yield True
        path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _build_into(source: Source, folder: Path, name: str) -> None:
    entry = folder / name
    temporary = folder / f".{name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
    temporary.mkdir()
    try:
        build(source, temporary)
        if source.entry_name() != name:
            raise ValueError(f"{source.path} has changed while it was waited for; start again")
        sync_files(temporary)
        # If another process was first, its folder stays, which holds the same.
        with suppress(OSError):
            temporary.rename(entry)
        if not is_finished(entry):
            raise RuntimeError(f"{temporary} cannot be renamed to {entry}; delete {entry}")
        sync_files(entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
