"""The resumable job that scores a whole data set once with the teacher.

Batches and shards follow from the data and the token budget alone. So any number of ranks, and a
job that was killed and started again, end with the same files, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup  # noqa: TID251 (a type; nothing is sent from here)
from tqdm import tqdm

from regate_ds.data.answer_index import AnswerIndex
from regate_ds.data.reference_store import ReferenceStore
from regate_ds.data.reference_writer import ReferenceWriter, begun_store
from regate_ds.parallel.layout import rank_in, size_of
from regate_ds.parallel.sync import sum_over
from regate_ds.teacher.text_only import ScoredSample

BATCHES_PER_SHARD = 8
"""What a killed job loses on each rank at most."""

Score = Callable[[Sequence[ScoredSample]], Tensor]
"""Losses in nats of all label positions of the samples, in order: fp32 [N]."""


@dataclass(frozen=True, kw_only=True)
class TeacherJob:
    """What is scored, by whom, and where the losses go."""

    index: AnswerIndex

    encode: Callable[[int], ScoredSample]
    """The sample of a row of the index."""

    score: Score
    teacher_id: str
    store: Path

    tokens_per_batch: int
    """Upper limit of padded tokens in a batch; a longer sample is a batch of its own."""

    @property
    def shards(self) -> list[list[list[int]]]:
        """Rows of each batch of each shard."""
        batches = plan_batches(self.index.num_positions, self.tokens_per_batch)
        starts = range(0, len(batches), BATCHES_PER_SHARD)
        return [batches[i : i + BATCHES_PER_SHARD] for i in starts]

    @property
    def is_complete(self) -> bool:
        """Whether the store holds it all. ValueError if it is another's, or damaged."""
        begun = begun_store(self.store, self.index, self.teacher_id)
        if begun is None or not begun.is_finished:
            return False
        ReferenceStore(self.store)
        return True


@dataclass(frozen=True)
class Throughput:
    """What this rank did in this start of the job."""

    num_tokens: int
    seconds: float

    def __str__(self) -> str:
        rate = self.num_tokens / max(self.seconds, 1e-9)
        return f"{self.num_tokens} tokens in {self.seconds:.1f} s ({rate:.0f} tokens/s)"


def plan_batches(num_positions: Tensor, tokens_per_batch: int) -> list[list[int]]:
    """Rows of similar length together, so that each batch has at most that many padded tokens.

    A row that is longer than the budget is a batch of its own.
    """
    order = num_positions.argsort(stable=True).tolist()
    lengths = num_positions.tolist()
    batches: list[list[int]] = []
    for row in order:
        # Rows come by length, so a batch is as wide as its newest row.
        if batches and (len(batches[-1]) + 1) * lengths[row] <= tokens_per_batch:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def precompute(
    job: TeacherJob, group: ProcessGroup | None = None, device: torch.device | str = "cpu"
) -> Throughput:
    """Score every sample into the job's store; finished shards are skipped.

    Every rank of ``group`` calls it; ``device`` is where the group's backend wants its tensors.
    ValueError if the folder holds a store of other data, another teacher or other batches.
    """
    if job.is_complete:
        return Throughput(0, 0.0)
    shards = job.shards
    rows = [[row for batch in shard for row in batch] for shard in shards]
    if rank_in(group) == 0:
        ReferenceWriter.create(job.store, job.index, job.teacher_id, rows)
    sum_over([0], group, device)  # The store exists now, for all ranks.
    writer = ReferenceWriter.create(job.store, job.index, job.teacher_id, rows)
    mine = range(rank_in(group), len(shards), size_of(group))
    open_shards = {n: shards[n] for n in mine if not writer.has_shard(n)}
    done = _score_shards(job, writer, open_shards, show=rank_in(group) == 0)
    sum_over([0], group, device)  # All shards exist now.
    if rank_in(group) == 0:
        writer.finish()
    sum_over([0], group, device)
    return done


def _score_shards(
    job: TeacherJob, writer: ReferenceWriter, shards: dict[int, list[list[int]]], *, show: bool
) -> Throughput:
    lengths = job.index.num_positions.tolist()
    total = sum(lengths[row] for shard in shards.values() for batch in shard for row in batch)
    begin = time.perf_counter()
    with tqdm(total=total, unit="token", unit_scale=True, desc="teacher", disable=not show) as bar:
        for number, batches in shards.items():
            losses = []
            for batch in batches:
                losses.append(job.score([job.encode(row) for row in batch]))
                bar.update(sum(lengths[row] for row in batch))
            writer.write_shard(number, torch.cat(losses))
    return Throughput(total, time.perf_counter() - begin)
