"""How a reference store is begun, gone on with, or added to.

- No store yet: all samples are to be scored.
- A store of the same data and teacher: what its manifest lists and the folder lacks.
- A finished store whose samples are all still there, unchanged, and new ones beside them: its
  shards stay as they are, and the new samples get shards of their own. Until these are done the
  folder is the store that it was; ``append.json`` says what it will be.
- Anything else is refused.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.stores.atomic_file import TEMPORARY_SUFFIX, make_folder, write_atomically
from regate_ds.stores.reference.manifest import (
    APPEND_NAME,
    MANIFEST_NAME,
    Manifest,
    Shard,
    content_of,
    files_of,
    hash_of,
    index_path,
    rows_path,
    shard_path,
)
from regate_ds.stores.reference.reader import load_index, load_rows
from regate_ds.stores.reference.shard import describe_samples

CutShards = Callable[[Tensor], list[list[int]]]
"""Cuts rows of the index, int64 [R], into shards: for each the rows in the order of its values."""


def is_complete(path: Path, index: AnswerIndex, teacher_id: str) -> bool:
    """Whether the folder is the finished store of this data and teacher, and nothing else.

    A store that this job may not touch is a ``ValueError`` naming both its owner and the job; so is
    a damaged file, the shards' apart. Only reads.
    """
    found = _current(path)
    if found is None:
        return False
    _require_own(path, found, index, teacher_id)
    there = _names_in(path).issuperset(file.name for file in files_of(path, found))
    own = found.fingerprint == index.fingerprint
    if not (own and found.is_finished and there) or leftovers(path, found):
        return False
    content_of(index_path(path, found), found.index_sha256)
    return True


def begin_store(
    path: Path,
    index: AnswerIndex,
    teacher_id: str,
    cut_shards: CutShards,
    tokens_per_batch: int,
) -> None:
    """Make the folder ready for writers; one process calls it, before them, at every start.

    Errors as of ``is_complete``; and a store that was begun with other batches is a ``ValueError``.
    """
    make_folder(path)
    found = _current(path)
    name, old_rows, shards = MANIFEST_NAME, torch.empty(0, dtype=torch.int64), ()
    if found is not None:
        old_rows = _require_own(path, found, index, teacher_id)
        if found.fingerprint != index.fingerprint:
            name, shards = APPEND_NAME, found.shards
    if (path / name).exists():
        _go_on(path / name, index, tokens_per_batch)
        return
    is_new = torch.ones(index.num_samples, dtype=torch.bool)
    is_new[old_rows] = False
    new_shards = cut_shards(is_new.nonzero().flatten())
    _require_partition([old_rows.tolist(), *new_shards], index.num_samples)
    rows_S = torch.tensor([*old_rows.tolist(), *(row for rows in new_shards for row in rows)])
    new = [_shard(rows, index, teacher_id, tokens_per_batch) for rows in new_shards]
    _write_unfinished(path / name, index, teacher_id, rows_S, (*shards, *new))


def await_store(path: Path, seconds: float = 60.0) -> None:
    """Until this process sees the store that another one has made ready.

    A network file system shows a new file to another machine only after a while. RuntimeError if
    it never does.
    """
    deadline = time.monotonic() + seconds
    # Listing a folder makes such a file system look again; asking for a name may not.
    while MANIFEST_NAME not in _names_in(path):
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"teacher.store={path} was made ready by the first rank, but "
                f"{socket.gethostname()} does not see it; name a folder that all machines share"
            )
        time.sleep(0.1)


def _names_in(path: Path) -> set[str]:
    try:
        os.listdir(path.absolute().parent)
        return set(os.listdir(path))
    except FileNotFoundError:
        return set()


def leftovers(path: Path, manifest: Manifest) -> list[Path]:
    """Files of ours in the folder that nothing names any more: of a killed job."""
    ours = ("shard-*.fp16", "index-*.npz", "rows-*.npy", APPEND_NAME, f".*{TEMPORARY_SUFFIX}")
    named = set(files_of(path, manifest))
    if (pending := _pending(path, manifest)) is not None:
        named |= {path / APPEND_NAME, *files_of(path, pending)}
    return sorted(file for form in ours for file in path.glob(form) if file not in named)


def _pending(path: Path, current: Manifest) -> Manifest | None:
    """What a store is being added to for; None also where that has been done."""
    if not (path / APPEND_NAME).exists():
        return None
    pending = Manifest.load(path, APPEND_NAME)
    return None if pending.fingerprint == current.fingerprint else pending


def _current(path: Path) -> Manifest | None:
    """The manifest of the store in the folder, if there is one."""
    if (path / MANIFEST_NAME).exists():
        return Manifest.load(path)
    if any(path.glob("shard-*.fp16")):
        raise ValueError(
            f"{path} holds shards but no {MANIFEST_NAME}, so that nothing tells of which data "
            "and teacher they are; restore it from a copy, or delete the folder"
        )
    return None


def _require_own(path: Path, found: Manifest, index: AnswerIndex, teacher_id: str) -> Tensor:
    """Refuse a store that neither is this job's nor can grow into it; else the rows, in the job's
    index, of the store's samples in the order of its values."""
    _require_equal(path, "teacher", found.teacher_id, teacher_id)
    if found.fingerprint == index.fingerprint:
        return torch.from_numpy(load_rows(path, found))
    what = "data with fingerprint"
    if not found.is_finished:
        rest = "; finish it with the data that it was begun with, then add to it"
        _require_equal(path, what, found.fingerprint, index.fingerprint, rest)
    try:
        new_rows_S = load_index(path, found).rows_in(index)
    except ValueError as error:
        rest = f"; samples may be added, but those of the store must stay as they are: {error}"
        _require_equal(path, what, found.fingerprint, index.fingerprint, rest)
        raise
    if (pending := _pending(path, found)) is not None:
        rest = f"; finish with the data that it grows into, or delete {path / APPEND_NAME}"
        _require_equal(path, what, pending.fingerprint, index.fingerprint, rest)
    return new_rows_S[torch.from_numpy(load_rows(path, found))]


def _require_equal(path: Path, what: str, old: str, new: str, rest: str = "") -> None:
    if old != new:
        raise ValueError(
            f"the reference store {path} belongs to {what} {old}, this job has {new}"
            f"{rest}; or give the job a folder of its own, or delete the store"
        )


def _shard(
    rows: Sequence[int], index: AnswerIndex, teacher_id: str, tokens_per_batch: int
) -> Shard:
    rows_R = torch.tensor(rows, dtype=torch.int64)
    samples = describe_samples(teacher_id, tokens_per_batch, index.digests[rows_R])
    return Shard(len(rows), int(index.num_labels[rows_R].sum()), tokens_per_batch, samples)


def _write_unfinished(
    file: Path, index: AnswerIndex, teacher_id: str, rows_S: Tensor, shards: tuple[Shard, ...]
) -> None:
    buffer = io.BytesIO()
    np.save(buffer, rows_S.to(torch.int64).numpy())
    index_bytes, rows_bytes, store = index.to_bytes(), buffer.getvalue(), file.parent
    hashes = hash_of(index_bytes), hash_of(rows_bytes)
    manifest = Manifest(index.fingerprint, teacher_id, *hashes, shards)
    _delete_shards_to_come(store, manifest)
    write_atomically(index_path(store, manifest), index_bytes)
    write_atomically(rows_path(store, manifest), rows_bytes)
    # Last: from here on the folder says what it is going to hold.
    write_atomically(file, manifest.to_bytes())


def _delete_shards_to_come(store: Path, manifest: Manifest) -> None:
    """Shards of an addition that was given up: none of those to come exists yet."""
    for number, shard in enumerate(manifest.shards):
        if shard.sha256 is None:
            shard_path(store, number).unlink(missing_ok=True)


def _go_on(file: Path, index: AnswerIndex, tokens_per_batch: int) -> None:
    """Forget the checksums of shards that are not there: they will be computed anew, and another
    machine may round the last digit otherwise."""
    store, manifest = file.parent, Manifest.load(file.parent, file.name)
    shards = list(manifest.shards)
    for number, shard in enumerate(shards):
        if not shard_path(store, number).exists():
            _require_batches(store, shard.tokens_per_batch, tokens_per_batch)
            shards[number] = replace(shard, sha256=None)
    going = replace(manifest, shards=tuple(shards))
    if not index_path(store, going).exists():
        content = index.to_bytes()
        going = replace(going, index_sha256=hash_of(content))
        write_atomically(index_path(store, going), content)
    if going != manifest:
        write_atomically(file, going.to_bytes())


def _require_batches(store: Path, begun: int, asked: int) -> None:
    if begun != asked:
        raise ValueError(
            f"the reference store {store} was begun with teacher.tokens_per_batch={begun}, this "
            f"job has {asked}; use the batches that it was begun with, or delete it"
        )


def _require_partition(shard_rows: Sequence[Sequence[int]], num_samples: int) -> None:
    if sorted(row for rows in shard_rows for row in rows) != list(range(num_samples)):
        raise ValueError(
            f"the shards must hold each of the {num_samples} samples of the index exactly once"
        )
