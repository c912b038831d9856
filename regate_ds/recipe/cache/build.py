"""Read and encode every record of a file once, in parallel, and write the cache of it.

    places.npy                        int64 [R, 2]: where each record lies in the file
    record_numbers.npy ...            the answer index (stores/index_files.py)
    first_image.npy, image_sizes.npy  the width and height of each sample's images
    bad.jsonl                         the records that cannot be used, and why
    manifest.json                     what the cache is of; written last

The number of workers changes no byte. Shapes: R records of the file, S usable ones, I images.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regate_ds.data.llava.parse import Cause, id_of
from regate_ds.data.llava.raw import data_files, find_places, open_raw
from regate_ds.data.llava.records import BadRecord, Record, SampleError
from regate_ds.job.preemption import leave_to_parent
from regate_ds.job.progress import progress
from regate_ds.recipe.cache.source import Source
from regate_ds.stores.checksums import checksum_of
from regate_ds.stores.index_files import ColumnWriter, IndexWriter
from regate_ds.stores.index_part import IndexPart
from regate_ds.stores.kind import MANIFEST_NAME

BAD_NAME = "bad.jsonl"

PART = 1_000
"""Records of one task of a worker; their texts are tokenised in one call."""

_WORTH_A_WORKER = 10_000
"""Records for which it pays to start another process, which takes seconds to import torch."""


@dataclass(frozen=True)
class _Part:
    """What one task found in consecutive records."""

    index: IndexPart
    num_images: np.ndarray
    """int64 [S]: number of images of each sample."""

    sizes: np.ndarray
    """int32 [I, 2]: width and height of each image."""

    unread: list[BadRecord]
    """Records that are bad as they stand in the file."""

    unencoded: list[BadRecord]
    """Records that are bad for this student."""


def build(source: Source, folder: Path, *, num_workers: int | None = None) -> None:
    """Write the files of a data set into a folder, the manifest last.

    num_workers: None takes all cores of this process, but no more than the records are worth.
    ValueError if the file holds no list of records, or changes meanwhile.
    """
    identity, stamp = source.identity(), source.stamp()
    places = find_places(source.path)
    # Written as they come: what the parts take together would stay with this process.
    index = IndexWriter(folder, source.name)
    first_image = ColumnWriter(folder, "first_image", np.int64)
    image_sizes = ColumnWriter(folder, "image_sizes", np.int32, 2)
    first_image.append(np.zeros(1))
    unread: list[BadRecord] = []
    unencoded: list[BadRecord] = []
    for part in _parts(source, places, num_workers):
        first_image.append(image_sizes.num_rows + part.num_images.cumsum())
        image_sizes.append(part.sizes)
        index.append(part.index)
        unread += part.unread
        unencoded += part.unencoded
    sha256 = content_hash(source.path)
    if source.stamp() != stamp:
        raise ValueError(f"{source.path} has changed while it was indexed; start again")
    records = ColumnWriter(folder, "places", np.int64, 2)
    records.append(places)
    for column in (index, first_image, image_sizes, records):
        column.close()
    with (folder / BAD_NAME).open("w", encoding="utf-8") as file:
        # Records were first all read, then all encoded: the first bad one stops a run.
        for one in (*unread, *unencoded):
            file.write(json.dumps([one.number, one.id, one.cause]) + "\n")
    manifest = {
        "num_records": len(places),
        "sha256": sha256,
        "checksums": {path.name: checksum_of(path) for path in sorted(folder.iterdir())},
        **identity,
    }
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def content_hash(path: Path) -> str:
    """Return the SHA-256 of the data's bytes, file after file."""
    content = hashlib.sha256()
    for each in data_files(path):
        with each.open("rb") as file:
            while chunk := file.read(1 << 22):
                content.update(chunk)
    return content.hexdigest()


def _parts(source: Source, places: np.ndarray, num_workers: int | None) -> Iterator[_Part]:
    """Yield what each task finds, in the order of the records."""
    if num_workers is None:
        num_workers = min(len(os.sched_getaffinity(0)), len(places) // _WORTH_A_WORKER)
    tasks = ((start, places[start : start + PART]) for start in range(0, len(places), PART))
    with progress(len(places), desc=f"encode {source.name}", unit="record") as bar:
        run = _run_here if num_workers <= 1 else _run_in_workers
        for part, num_records in run(source, tasks, num_workers):
            bar.update(num_records)
            yield part


_Task = tuple[int, np.ndarray]
"""The number of the first record, and the places of all of them."""


def _run_here(source: Source, tasks: Iterator[_Task], _: int) -> Iterator[tuple[_Part, int]]:
    with _one_thread_of_tokenizers():
        for start, places in tasks:
            yield _encode_part(source, start, places), len(places)


def _run_in_workers(
    source: Source, tasks: Iterator[_Task], num_workers: int
) -> Iterator[tuple[_Part, int]]:
    pool = ProcessPoolExecutor(
        num_workers,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(source,),
    )
    waiting: deque[tuple[Future[_Part], int]] = deque()
    try:
        for start, places in tasks:
            waiting.append((pool.submit(_work, start, places), len(places)))
            if len(waiting) > 4 * num_workers:
                future, num_records = waiting.popleft()
                yield future.result(), num_records
        for future, num_records in waiting:
            yield future.result(), num_records
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"a process that indexes {source.path} was killed, as happens where memory is short; "
            "free memory, or allow this job fewer cores, and start again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_part(source: Source, start: int, places: np.ndarray) -> _Part:
    raw, parser = open_raw(source.path, places), source.parser(verify_images=True)
    records: list[Record] = []
    unread: list[BadRecord] = []
    for number in range(len(places)):
        found = raw[number]
        try:
            records.append(parser.record(start + number, found))
        except Cause as cause:
            unread.append(BadRecord(source.path, start + number, id_of(found), str(cause)))
    samples, unencoded = [], []
    for sample in source.encoder.encode_all(records):
        if not isinstance(sample, SampleError):
            samples.append(sample)
        elif sample.bad is None:
            raise sample
        else:
            unencoded.append(sample.bad)
    sizes = [size for sample in samples for size in sample.image_sizes]
    return _Part(
        IndexPart.of(samples),
        np.array([len(sample.image_sizes) for sample in samples], dtype=np.int64),
        np.array(sizes, dtype=np.int32).reshape(-1, 2),
        unread,
        unencoded,
    )


_worker: dict[str, Source] = {}
"""In a worker: what it reads. It is sent once, because a tokenizer is large."""


def _start_worker(source: Source) -> None:
    leave_to_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    _worker["source"] = source


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for tasks for ever."""
    parent: Any = parent_process()
    parent.join()
    os._exit(1)


def _work(start: int, places: np.ndarray) -> _Part:
    return _encode_part(_worker["source"], start, places)


@contextmanager
def _one_thread_of_tokenizers() -> Iterator[None]:
    """Keep the tokenizer from starting threads, as the loader's workers are forked from here."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before
