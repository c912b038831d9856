"""Rank the tokens of every picture once, in a job that can be resumed.

Batches and shards depend on the data and the batch size alone. So any number of ranks, and a job
that was killed and started again, end with the same files, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from regate_ds.algorithm.rankings.ranking import Picture, StoredRanking
from regate_ds.job.progress import progress
from regate_ds.job.read_ahead import read_ahead
from regate_ds.parallel.layout import ProcessGroup, rank_in, size_of
from regate_ds.stores.image_orders.manifest import OrdersSubject
from regate_ds.stores.image_orders.pictures import PictureTable, ShownPicture, num_stored
from regate_ds.stores.image_orders.writer import (
    ImageOrderWriter,
    begin_orders,
    is_complete_orders,
)
from regate_ds.stores.shard_job import fill_store
from regate_ds.stores.shares import into_shards, share_out

PictureInputs = dict[str, Tensor]
"""Model inputs of some pictures alone, such as ``pixel_values``."""

UnitBatch = list[int]
"""Numbers of the units of one forward pass."""


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

    units: Sequence[Sequence[ShownPicture]]
    """Pictures that are read together; each picture of the data stands in one unit."""

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
        if not any(self.units):
            raise ValueError(
                "the data has no image, so there is nothing to rank; train without "
                "images.keep_share, or check where the data's images are"
            )

    @cached_property
    def shards(self) -> list[list[UnitBatch]]:
        """The batches of each shard, large pictures first: what is too large fails at once."""
        tokens = [sum(shown.num_tokens for shown in unit) for unit in self.units]
        batches: list[UnitBatch] = []
        room = 0
        for unit in sorted(range(len(self.units)), key=lambda unit: -tokens[unit]):
            num_pictures = len(self.units[unit])
            if batches and num_pictures <= room:
                batches[-1].append(unit)
                room -= num_pictures
            else:
                batches.append([unit])
                room = self.batch - num_pictures
        return into_shards(batches)

    def pictures(self, batches: Sequence[UnitBatch]) -> list[ShownPicture]:
        """Return the pictures of some batches, in order."""
        return [shown for batch in batches for unit in batch for shown in self.units[unit]]

    @cached_property
    def content(self) -> OrdersSubject:
        """What the orders are of."""
        pictures = [shown for batches in self.shards for shown in self.pictures(batches)]
        return OrdersSubject(
            fingerprint=self.fingerprint,
            ranking=self.ranking.stored,
            model_id=self.model_id,
            table=PictureTable(tuple(pictures)),
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
        num_pictures = [len(self.pictures(batches)) for batches in self.shards]
        begin_orders(self.store, self.content, self.batch, num_pictures)

    def writer(self) -> ImageOrderWriter:
        """Open the store for writing."""
        return ImageOrderWriter(self.store)

    def read_batch(self, batch: UnitBatch) -> PictureInputs:
        """Return the model inputs of a batch's pictures.

        ValueError if they cannot be joined, as where pictures are cut into tiles.
        """
        parts = [self.read(unit) for unit in batch]
        for name in parts[0]:
            shapes = {tuple(part[name].shape[1:]) for part in parts}
            if len(shapes) > 1:
                raise ValueError(
                    f"{name} of several pictures have the shapes {sorted(shapes)} and cannot be "
                    "joined; set rank.batch=1, or use images.ranking=random or stride"
                )
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def rank(self, batch: UnitBatch, inputs: PictureInputs) -> list[Tensor]:
        """Return the first half of the order of each of a batch's pictures."""
        sizes = [shown.num_tokens for shown in self.pictures([batch])]
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
    pictures = {number: job.pictures(job.shards[number]) for number in missing}
    costs = [sum(shown.num_tokens for shown in pictures[number]) for number in missing]
    mine = [missing[i] for i in share_out(costs, size_of(group))[rank_in(group)]]
    total, show = sum(len(pictures[number]) for number in mine), rank_in(group) == 0
    with progress(total, desc="rank", unit="image", show=show) as bar:
        batches = [batch for number in mine for batch in job.shards[number]]
        contents = read_ahead(job.read_batch, batches)
        for number in mine:
            orders: list[Tensor] = []
            for batch in job.shards[number]:
                orders += job.rank(batch, next(contents))
                bar.update(len(job.pictures([batch])))
            writer.write_shard(number, orders)
    return sum(map(len, pictures.values()))
