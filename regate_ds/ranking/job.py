"""Rank the tokens of every picture once, in a job that can be resumed.

Batches and shards depend on the data and the batch size alone. So any number of ranks, and a job
that was killed and started again, end with the same files, bit for bit.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from regate_ds.algorithm.rankings.ranking import Picture, StoredRanking
from regate_ds.job.progress import progress
from regate_ds.job.read_ahead import read_ahead
from regate_ds.parallel.layout import ProcessGroup, rank_in, size_of
from regate_ds.stores.image_orders.manifest import OrdersSubject
from regate_ds.stores.image_orders.pictures import PictureTable, num_stored, ranges
from regate_ds.stores.image_orders.writer import (
    ImageOrderWriter,
    begin_orders,
    is_complete_orders,
)
from regate_ds.stores.shard_job import fill_store
from regate_ds.stores.shares import into_shards, share_out

PictureInputs = dict[str, Tensor]
"""Model inputs of some pictures alone, such as ``pixel_values``."""


@dataclass(frozen=True)
class Units:
    """Pictures that are read together: unit u has those from ``first_U1[u]`` to ``first_U1[u+1]``
    of the table."""

    table: PictureTable
    first_U1: np.ndarray
    """int64 [units + 1]"""

    def __len__(self) -> int:
        return len(self.first_U1) - 1

    @cached_property
    def tokens_U(self) -> np.ndarray:
        """int64: number of tokens of each unit's pictures."""
        total = np.concatenate([[0], np.cumsum(self.table.sizes_P, dtype=np.int64)])
        return np.diff(total[self.first_U1])

    def pictures(self, units: np.ndarray) -> np.ndarray:
        """Return the numbers of the pictures of some units, in order."""
        return ranges(self.first_U1[units], np.diff(self.first_U1)[units])


@dataclass(frozen=True)
class RankCost:
    """The work of all ranks in this start of the job; all zero if an earlier start had done it."""

    num_pictures: int
    seconds: float

    def __str__(self) -> str:
        if self.num_pictures == 0:
            return "nothing was left to compute"
        rate = self.num_pictures / max(self.seconds, 1e-9)
        return f"{self.num_pictures} images in {self.seconds:.1f} s ({rate:.1f} images/s)"


@dataclass(frozen=True, kw_only=True)
class RankJob:
    """Which pictures are ranked, by what, and where the orders are stored."""

    units: Units
    """Each picture of the data stands in one unit."""

    read: Callable[[int], PictureInputs]
    """Returns the model inputs of the pictures of a unit, by its number."""

    look: Callable[[PictureInputs, Sequence[int]], list[Picture]]
    """Returns what the ranking reads of pictures, from their inputs and numbers of tokens."""

    ranking: StoredRanking
    fingerprint: str
    """Fingerprint of the answer index of the data."""

    model_id: str | None
    """Name of the tower and the projector; None if the ranking reads pixels alone."""

    store: Path
    """Folder of the store."""

    batch: int
    """Pictures of one forward pass; a unit with more is a batch of its own."""

    def __post_init__(self) -> None:
        if not len(self.units.table):
            raise ValueError(
                "the data has no image, so there is nothing to rank; train without "
                "images.keep_share, or check where the data's images are"
            )

    @cached_property
    def order_U(self) -> np.ndarray:
        """The units, large ones first: what is too large fails at once."""
        return np.argsort(-self.units.tokens_U, kind="stable")

    @cached_property
    def _starts(self) -> array[int]:
        """The place of each batch's first unit in ``order_U``, and their number."""
        starts, room = array("q"), 0
        for place, count in enumerate(np.diff(self.units.first_U1)[self.order_U].tolist()):
            if not starts or count > room:
                starts.append(place)
                room = self.batch
            room -= count
        starts.append(len(self.units))
        return starts

    @cached_property
    def shards(self) -> list[range]:
        """The numbers of the batches of each shard."""
        return into_shards(range(len(self._starts) - 1))

    def units_of(self, batches: range) -> np.ndarray:
        """Return the units of batches that follow each other."""
        return self.order_U[self._starts[batches.start] : self._starts[batches.stop]]

    @cached_property
    def content(self) -> OrdersSubject:
        """What the orders are of."""
        return OrdersSubject(
            fingerprint=self.fingerprint,
            ranking=self.ranking.stored,
            model_id=self.model_id,
            table=self.units.table.take(self.units.pictures(self.order_U)),
        )

    @property
    def subject(self) -> str:
        """The data, the model and the ranking, by name."""
        data = f"data with fingerprint {self.fingerprint[:12]}"
        return f"{data}, model {self.model_id} and ranking {self.ranking.stored}"

    @property
    def settings(self) -> str:
        return f"batch={self.batch}"

    @property
    def is_complete(self) -> bool:
        """Whether the store is finished. ValueError if it is damaged, or not this job's."""
        return is_complete_orders(self.store, self.content)

    def begin(self) -> None:
        """Make the store ready for writers."""
        num_pictures = [self.num_pictures(batches) for batches in self.shards]
        begin_orders(self.store, self.content, self.batch, num_pictures)

    def writer(self) -> ImageOrderWriter:
        """Open the store for writing."""
        return ImageOrderWriter(self.store)

    def num_pictures(self, batches: range) -> int:
        """Return how many pictures some batches have."""
        return len(self.units.pictures(self.units_of(batches)))

    def read_batch(self, batch: int) -> PictureInputs:
        """Return the model inputs of a batch's pictures; ValueError as ``read_units``."""
        return self.read_units(self.units_of(range(batch, batch + 1)).tolist())

    def read_units(self, units: Sequence[int]) -> PictureInputs:
        """Return the model inputs of some units' pictures.

        ValueError if they cannot be joined, as where pictures are cut into tiles.
        """
        parts = [self.read(unit) for unit in units]
        for name in parts[0]:
            shapes = {tuple(part[name].shape[1:]) for part in parts}
            if len(shapes) > 1:
                raise ValueError(
                    f"{name} of several pictures have the shapes {sorted(shapes)} and cannot be "
                    "joined; set rank.batch=1, or use images.ranking=random or stride"
                )
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def rank(self, batch: int, inputs: PictureInputs) -> list[Tensor]:
        """Return the first half of the order of each of a batch's pictures."""
        pictures = self.units.pictures(self.units_of(range(batch, batch + 1)))
        sizes = self.units.table.sizes_P[pictures].tolist()
        pairs = zip(self.look(inputs, sizes), sizes, strict=True)
        return [self.ranking.order(picture, num_stored(size)).cpu() for picture, size in pairs]


def rank_pictures(
    job: RankJob, group: ProcessGroup | None = None, device: torch.device | str = "cpu"
) -> RankCost:
    """Rank every picture and write the job's store; shards that exist are not computed again.

    Every rank of ``group`` makes this call; ``device`` is where the group's backend wants tensors.
    ValueError if the folder holds a store of something else, RuntimeError if the ranks' jobs
    differ.
    """
    filled = fill_store(job, partial(_rank_missing, job, group), group, device)
    return RankCost(0, 0.0) if filled is None else RankCost(*filled)


def _rank_missing(
    job: RankJob, group: ProcessGroup | None, writer: ImageOrderWriter, missing: list[int]
) -> int:
    """Rank this rank's part of the missing shards; return how many pictures all ranks ranked."""
    costs = [int(job.units.tokens_U[job.units_of(job.shards[n])].sum()) for n in missing]
    mine = [missing[i] for i in share_out(costs, size_of(group))[rank_in(group)]]
    counts = {number: job.num_pictures(job.shards[number]) for number in missing}
    total, show = sum(counts[number] for number in mine), rank_in(group) == 0
    with progress(total, desc="rank", unit="image", show=show) as bar:
        batches = [batch for number in mine for batch in job.shards[number]]
        contents = read_ahead(job.read_batch, batches)
        for number in mine:
            orders: list[Tensor] = []
            for batch in job.shards[number]:
                found = job.rank(batch, next(contents))
                bar.update(len(found))
                orders += found
            writer.write_shard(number, orders)
    return sum(counts.values())
