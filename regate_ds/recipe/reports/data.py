"""`regate data check CONFIG`: index the data of a run, and say what is bad in it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from regate_ds.recipe.cache.build import build
from regate_ds.recipe.cache.entry import DataSet, open_data, read_entry, way_out
from regate_ds.recipe.cache.source import Source
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.corpus import (
    cache_folders,
    corpus_encoder,
    corpus_student,
    report_cut,
    report_writer,
    sources_of,
)
from regate_ds.stores.answer_index import spans

_MOST_NAMED = 10
"""Number of changed records that are named."""


def check_data(config: RunConfig, *, content: bool) -> bool:
    """Index the data files of a run where they have not been, and print what was found.

    content: also read and encode everything again, and compare the hashes of the files' bytes and
        of each sample with those of the index.

    Returns whether a run can train on the data: it has samples, no bad records unless
    `data.skip_bad`, and nothing has changed since it was indexed.
    """
    student = corpus_student(config, weights=False)
    report_writer(student)
    encoder = corpus_encoder(student, config.data)
    is_good = True
    for number, source in enumerate(sources_of(config.data, encoder)):
        found = open_data(source, cache_folders(config, source.path))
        print("\n".join(_described(found)))
        if number == 0:
            report_cut(found, config.data.max_length)
        changes = list(_changes(source, found)) if content else []
        for change in changes:
            print(change)
        if changes:
            print(way_out(found.folder))
        can_train = len(found.records) > 0 and (config.data.skip_bad or not found.bad)
        is_good = is_good and can_train and not changes
    return is_good


def _described(found: DataSet) -> Iterator[str]:
    index = found.index
    yield (
        f"{found.source.path}: {found.about['num_records']} records, {len(found.records)} samples, "
        f"{int(index.num_positions.sum())} tokens, {index.num_tokens} answer tokens, "
        f"{len(found.image_sizes)} images"
    )
    yield f"fingerprint {index.fingerprint}, in {found.folder}"
    if found.bad:
        yield f"{len(found.bad)} bad records:"
    yield from (f"  {one}" for one in found.bad)


def _changes(source: Source, found: DataSet) -> Iterator[str]:
    """Yield a line for each change since the data was indexed."""
    with tempfile.TemporaryDirectory() as folder:
        build(source, Path(folder))
        now = read_entry(source, Path(folder))
        if now.about["sha256"] != found.about["sha256"]:
            yield (
                f"{source.path} has other bytes than when it was indexed, though its size and "
                "time are the same"
            )
        changed = _changed_records(found, now)
        for number in changed[:_MOST_NAMED]:
            yield f"{source.path}, record {number}, has changed"
        if len(changed) > _MOST_NAMED:
            yield f"{source.path}: {len(changed)} records have changed"


def _changed_records(before: DataSet, now: DataSet) -> list[int]:
    """Return the numbers of records whose tokens, images' sizes or fault differ."""
    numbers, new_numbers = (data.index.keys.record_numbers for data in (before, now))
    both_R, old_R, new_R = np.intersect1d(numbers, new_numbers, True, return_indices=True)
    is_same_R = (before.index.digests[old_R] == now.index.digests[new_R]).all(dim=1).numpy()
    is_same_R &= _num_images(before)[old_R] == _num_images(now)[new_R]
    same = np.flatnonzero(is_same_R)
    is_other_I = (_sizes(before, old_R[same]) != _sizes(now, new_R[same])).any(axis=1)
    is_same_R[np.repeat(same, _num_images(before)[old_R[same]])[is_other_I]] = False
    causes, new_causes = ({one.number: one.cause for one in data.bad} for data in (before, now))
    faults = [n for n in causes.keys() | new_causes.keys() if causes.get(n) != new_causes.get(n)]
    changed = [*both_R[~is_same_R].tolist(), *np.setxor1d(numbers, new_numbers).tolist(), *faults]
    return sorted(set(changed))


def _num_images(data: DataSet) -> np.ndarray:
    return np.diff(data.first_image)


def _sizes(data: DataSet, rows: np.ndarray) -> np.ndarray:
    """Return int32 [I, 2]: the sizes of all images of these rows."""
    starts = torch.from_numpy(data.first_image[rows])
    return data.image_sizes[spans(starts, torch.from_numpy(_num_images(data)[rows])).numpy()]
