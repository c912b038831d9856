"""Fill a store shard by shard, on any number of ranks, in a job that can be resumed.

A shard that exists is not computed again; which rank computes a shard is left to the job.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch

from regate_ds.parallel.collectives import broadcast_text, is_same_on_all, sum_over
from regate_ds.parallel.layout import ProcessGroup, rank_in, size_of
from regate_ds.stores.kind import MANIFEST_NAME
from regate_ds.stores.shard_file import ShardFile

_Result = TypeVar("_Result")


class ShardWriter(Protocol):
    """A store that is being computed."""

    path: Path

    @property
    def files(self) -> Sequence[ShardFile]:
        """All shards of the store, by number."""
        ...

    def finish(self) -> None:
        """Check every shard, and put the checksums into the manifest. One process calls it."""
        ...


_Writer = TypeVar("_Writer", bound=ShardWriter, covariant=True)


class ShardJob(Protocol, Generic[_Writer]):
    """What is computed, and where it is stored."""

    @property
    def store(self) -> Path:
        """Folder of the store."""
        ...

    @property
    def subject(self) -> str:
        """What the store is of: the data and the model, by name."""
        ...

    @property
    def settings(self) -> str:
        """What else decides the bytes of the store, as it is spelled in the configuration."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether the store is finished. ValueError if it is damaged, or not this job's."""
        ...

    def begin(self) -> None:
        """Make the store ready for writers. One process calls it."""
        ...

    def writer(self) -> _Writer:
        """Open the store for writing."""
        ...


def fill_store(
    job: ShardJob[_Writer],
    compute: Callable[[_Writer, list[int]], _Result],
    group: ProcessGroup | None = None,
    device: torch.device | str = "cpu",
) -> tuple[_Result, float] | None:
    """Let ``compute`` write the shards that the job's store lacks, and finish the store.

    Returns what ``compute`` returned and the seconds that it took; None if nothing was missing.
    Every rank of ``group`` makes this call, and writes its part of the numbers that ``compute``
    gets. ``device`` is where the group's backend wants tensors. ValueError if the folder holds
    something else than the job computes, RuntimeError if the ranks' jobs differ.
    """
    _require_one_job(job, group, device)
    (num_done,) = sum_over([int(job.is_complete)], group, device)
    if num_done < size_of(group):
        on_first(job.begin, group, device)
    await_store(job.store)
    writer = job.writer()
    # All ranks take the first rank's list: on a network file system the others may see less.
    missing = [int(n) for n in broadcast_text(_list(missing_in(writer)), group, device).split()]
    _check_part(writer, missing, group)
    sum_over([0], group, device)  # All ranks have looked before one of them writes.
    if num_done == size_of(group):
        return None
    begin = time.perf_counter()
    result = compute(writer, missing)
    sum_over([0], group, device)  # All shards exist now.
    seconds = time.perf_counter() - begin
    on_first(writer.finish, group, device)
    return result, seconds


def missing_in(writer: ShardWriter) -> list[int]:
    """Return the numbers of the shards that have no file yet. A file that exists is whole."""
    names = set(os.listdir(writer.path))
    return [number for number, file in enumerate(writer.files) if file.path.name not in names]


def await_store(path: Path, seconds: float = 60.0, *, file: str = MANIFEST_NAME) -> None:
    """Wait until this process sees the folder that another one has made ready, its file last.

    A network file system shows a new file to another node only after a while. RuntimeError if
    it does not within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    # Listing a folder makes a network file system look again; asking for one name may not.
    while file not in names_in(path):
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{path} was made ready by the first rank, but {socket.gethostname()} does not see "
                "it; name a folder that all nodes share"
            )
        time.sleep(0.1)


def names_in(path: Path) -> set[str]:
    """Return the names in a folder, as a network file system has them now; none if it is gone."""
    try:
        os.listdir(path.absolute().parent)
        return set(os.listdir(path))
    except FileNotFoundError:
        return set()


def _require_one_job(
    job: ShardJob[_Writer], group: ProcessGroup | None, device: torch.device | str
) -> None:
    """Refuse ranks with other data or another model, whose numbers would get into this store."""
    if not is_same_on_all(f"{job.subject}, {job.settings}", group, device):
        raise RuntimeError(
            f"rank {rank_in(group)} has {job.subject}, other ranks have not; give all ranks the "
            f"same data, model and settings ({job.settings})"
        )


def on_first(
    action: Callable[[], None], group: ProcessGroup | None, device: torch.device | str
) -> None:
    """Run an action on the first rank only; if it fails there, all ranks raise."""
    error, text = None, ""
    if rank_in(group) == 0:
        try:
            action()
        except Exception as caught:  # noqa: BLE001 (it is raised again; the others must hear of it)
            error, text = caught, str(caught) or repr(caught)
    text = broadcast_text(text, group, device)
    if error is not None:
        raise error
    if text:
        raise RuntimeError(f"on the first rank: {text}")


def _list(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def _check_part(writer: ShardWriter, missing: list[int], group: ProcessGroup | None) -> None:
    """Check this rank's part of the shards that an earlier start wrote."""
    written = sorted(set(range(len(writer.files))) - set(missing))
    for number in written[rank_in(group) :: size_of(group)]:
        writer.files[number].check()
