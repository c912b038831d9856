"""Begin a reference store, resume it, or add samples to it.

What a job does depends on what its folder holds:

- No store: the job scores all samples.
- A store of the same data and teacher: it scores the shards that the folder lacks.
- A finished store whose samples are all in the job's data, unchanged, beside new ones: the shards
  stay as they are, and the new samples get shards of their own. Until these are done the folder
  counts as the shorter store; ``append.json`` is the manifest of the longer one.
- Anything else: it refuses the folder.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from regate_ds.algorithm.scores.score import Column
from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.stores.atomic_file import TEMPORARY_SUFFIX, make_folder, write_atomically
from regate_ds.stores.kind import MANIFEST_NAME, hash_of
from regate_ds.stores.reference.manifest import (
    APPEND_NAME,
    REFERENCE,
    Manifest,
    Shard,
    files_of,
    index_path,
    rows_path,
    shard_path,
)
from regate_ds.stores.reference.reader import load_index, load_rows
from regate_ds.stores.reference.shard import describe_samples
from regate_ds.stores.shard_job import names_in

CutShards = Callable[[Tensor], list[Tensor]]
"""Cuts rows of the index, int64 [R], into shards; returns each shard's rows in order."""


def is_complete(path: Path, index: AnswerIndex, teacher_id: str, column: Column = "text") -> bool:
    """Return whether the folder is the finished store of this data and teacher, without leftovers.

    It only reads. ``ValueError`` if the store belongs to other data, another teacher or another
    column, or if a file other than a shard is damaged.
    """
    found = _current(path)
    if found is None:
        return False
    REFERENCE.require_same(path, "column", found.column, column)
    _require_growable(path, found, index, teacher_id)
    has_files = names_in(path).issuperset(file.name for file in files_of(path, found))
    is_same_data = found.fingerprint == index.fingerprint
    if not (is_same_data and found.is_finished and has_files) or leftovers(path, found):
        return False
    REFERENCE.content_of(index_path(path, found), found.index_sha256)
    return True


def begin_store(  # noqa: PLR0913 (what a store is of, and where)
    path: Path,
    index: AnswerIndex,
    teacher_id: str,
    cut_shards: CutShards,
    tokens_per_batch: int,
    column: Column = "text",
) -> None:
    """Make the folder ready for writers. One process calls it, before them, at every start.

    ``ValueError`` as in ``is_complete``, and if the store was begun with other batches.
    """
    make_folder(path)
    found = _current(path)
    name, old_rows, shards = MANIFEST_NAME, torch.empty(0, dtype=torch.int64), ()
    if found is not None:
        REFERENCE.require_same(path, "column", found.column, column)
        old_rows = _require_growable(path, found, index, teacher_id)
        if found.fingerprint != index.fingerprint:
            name, shards = APPEND_NAME, found.shards
    if (path / name).exists():
        _resume(path / name, index, tokens_per_batch)
        return
    is_new = torch.ones(index.num_samples, dtype=torch.bool)
    is_new[old_rows] = False
    new_shards = cut_shards(is_new.nonzero().flatten())
    rows_S = torch.cat([old_rows, *new_shards])
    _require_partition(rows_S, index.num_samples)
    new = [_shard(rows, index, teacher_id, tokens_per_batch) for rows in new_shards]
    manifest = Manifest(index.fingerprint, teacher_id, "", "", (*shards, *new), column=column)
    _write_unfinished(path / name, index, manifest, rows_S)


def leftovers(path: Path, manifest: Manifest) -> list[Path]:
    """Return the store's files in the folder that no manifest names any more, as after a kill."""
    forms = ("shard-*.fp16", "index-*.npz", "rows-*.npy", APPEND_NAME, f".*{TEMPORARY_SUFFIX}")
    named = set(files_of(path, manifest))
    if (pending := _pending(path, manifest)) is not None:
        named |= {path / APPEND_NAME, *files_of(path, pending)}
    return sorted(file for form in forms for file in path.glob(form) if file not in named)


def _pending(path: Path, current: Manifest) -> Manifest | None:
    """Return the manifest of the longer store that is being written; None if there is none."""
    if not (path / APPEND_NAME).exists():
        return None
    pending = Manifest.load(path, APPEND_NAME)
    return None if pending.fingerprint == current.fingerprint else pending


def _current(path: Path) -> Manifest | None:
    """Return the manifest of the store in the folder, or None if there is no store."""
    return Manifest.load(path) if REFERENCE.holds(path, "shard-*.fp16") else None


def _require_growable(path: Path, found: Manifest, index: AnswerIndex, teacher_id: str) -> Tensor:
    """Return the rows, in the job's index, of the store's samples in the order of their values.

    ``ValueError`` if the store neither is this job's nor can grow into it.
    """
    REFERENCE.require_same(path, "teacher", found.teacher_id, teacher_id)
    if found.fingerprint == index.fingerprint:
        return torch.from_numpy(load_rows(path, found))
    what = "data with fingerprint"
    if not found.is_finished:
        rest = "; finish it with the data that it was begun with, then add to it"
        REFERENCE.require_same(path, what, found.fingerprint, index.fingerprint, rest)
    try:
        new_rows_S = load_index(path, found).rows_in(index)
    except ValueError as error:
        rest = f"; samples may be added, but those of the store must stay as they are: {error}"
        REFERENCE.require_same(path, what, found.fingerprint, index.fingerprint, rest)
        raise
    if (pending := _pending(path, found)) is not None:
        rest = f"; finish the addition with its own data, or delete {path / APPEND_NAME}"
        REFERENCE.require_same(path, what, pending.fingerprint, index.fingerprint, rest)
    return new_rows_S[torch.from_numpy(load_rows(path, found))]


def _shard(rows_R: Tensor, index: AnswerIndex, teacher_id: str, tokens_per_batch: int) -> Shard:
    samples = describe_samples(teacher_id, tokens_per_batch, index.digests[rows_R])
    return Shard(len(rows_R), int(index.num_labels[rows_R].sum()), tokens_per_batch, samples)


def _write_unfinished(file: Path, index: AnswerIndex, manifest: Manifest, rows_S: Tensor) -> None:
    """Write index and rows, and the manifest with their hashes."""
    buffer = io.BytesIO()
    np.save(buffer, rows_S.to(torch.int64).numpy())
    index_bytes, rows_bytes, store = index.to_bytes(), buffer.getvalue(), file.parent
    hashes = {"index_sha256": hash_of(index_bytes), "rows_sha256": hash_of(rows_bytes)}
    manifest = replace(manifest, **hashes)
    _delete_shards_to_come(store, manifest)
    write_atomically(index_path(store, manifest), index_bytes)
    write_atomically(rows_path(store, manifest), rows_bytes)
    # Written last: from here on the folder names what it is to hold.
    write_atomically(file, manifest.to_bytes())


def _delete_shards_to_come(store: Path, manifest: Manifest) -> None:
    """Delete shards of an addition that was given up; unwritten shards have the same names."""
    for number, shard in enumerate(manifest.shards):
        if shard.sha256 is None:
            shard_path(store, number).unlink(missing_ok=True)


def _resume(file: Path, index: AnswerIndex, tokens_per_batch: int) -> None:
    """Forget the checksums of shards that have no file: they are computed again, and other hardware
    may round the last digit differently. Write the index again if it is missing."""
    store, manifest = file.parent, Manifest.load(file.parent, file.name)
    shards = list(manifest.shards)
    for number, shard in enumerate(shards):
        if not shard_path(store, number).exists():
            REFERENCE.require_setting(
                store, "teacher.tokens_per_batch", shard.tokens_per_batch, tokens_per_batch
            )
            shards[number] = replace(shard, sha256=None)
    resumed = replace(manifest, shards=tuple(shards))
    if not index_path(store, resumed).exists():
        content = index.to_bytes()
        resumed = replace(resumed, index_sha256=hash_of(content))
        write_atomically(index_path(store, resumed), content)
    if resumed != manifest:
        write_atomically(file, resumed.to_bytes())


def _require_partition(rows_S: Tensor, num_samples: int) -> None:
    if not torch.equal(rows_S.sort().values, torch.arange(num_samples)):
        raise ValueError(
            f"the shards do not hold each of the {num_samples} samples of the index exactly once; "
            "cut_shards must return each of its rows once"
        )
