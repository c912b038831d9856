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

from regate_ds.algorithm.batch import IGNORE
from regate_ds.data.answer_index import AnswerIndex
from regate_ds.data.progress import progress
from regate_ds.data.reference_store import ReferenceStore
from regate_ds.data.reference_writer import ReferenceWriter, begun_store, has_all_files
from regate_ds.parallel.layout import ProcessGroup, rank_in, size_of
from regate_ds.parallel.sync import sum_over
from regate_ds.teacher.batch_plan import (
    Batch,
    padded_tokens,
    plan_batches,
    plan_shards,
    share_out,
)
from regate_ds.teacher.text_only import ScoredSample

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

    ranks_per_replica: int = 1
    """Consecutive ranks that hold one teacher together: they score the same batches, and the first
    of them writes."""

    in_step: bool = False
    """True if all ranks must score equally often, as those that hold a ZeRO-3 teacher."""

    @property
    def shards(self) -> list[list[Batch]]:
        """The batches of each shard."""
        return plan_shards(plan_batches(self.index.num_positions, self.tokens_per_batch))

    @property
    def is_complete(self) -> bool:
        """Whether the store holds it all. ValueError if it is another's, or damaged."""
        begun = begun_store(self.store, self.index, self.teacher_id)
        if begun is None or not begun.is_finished or not has_all_files(self.store, begun):
            return False
        ReferenceStore(self.store)
        return True

    def read(self, row: int) -> ScoredSample:
        """The sample of a row. ValueError if it is not what the index was built from."""
        sample = self.encode(row)
        num_labels = int((sample.labels_S != IGNORE).sum())
        expected = self.index.keys[row], int(self.index.num_labels[row])
        if (sample.key, num_labels) != expected:
            raise ValueError(
                f"row {row} of the answer index is sample {expected[0]} with {expected[1]} answer "
                f"tokens, the data gives {sample.key} with {num_labels}; build the index and the "
                "samples from the same data"
            )
        return sample


@dataclass(frozen=True)
class Throughput:
    """What this rank did in this start of the job."""

    num_tokens: int
    seconds: float

    def __str__(self) -> str:
        rate = self.num_tokens / max(self.seconds, 1e-9)
        return f"{self.num_tokens} tokens in {self.seconds:.1f} s ({rate:.0f} tokens/s)"


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
    missing = [n for n in range(len(shards)) if not writer.has_shard(n)]
    sum_over([0], group, device)  # All ranks have looked before one of them writes.
    # Of what is missing, an equal part each: a replica that was far ahead would wait for hours.
    replica, place = divmod(rank_in(group), job.ranks_per_replica)
    costs = [padded_tokens(shards[n], job.index.num_positions) for n in missing]
    parts = [
        {missing[i]: shards[missing[i]] for i in part}
        for part in share_out(costs, size_of(group) // job.ranks_per_replica)
    ]
    done = _score_shards(
        job, writer if place == 0 else None, parts[replica], show=rank_in(group) == 0
    )
    if job.in_step:
        _keep_up(job, parts, replica)
    sum_over([0], group, device)  # All shards exist now.
    if rank_in(group) == 0:
        writer.finish()
    sum_over([0], group, device)
    return done


def _score_shards(
    job: TeacherJob, writer: ReferenceWriter | None, shards: dict[int, list[Batch]], *, show: bool
) -> Throughput:
    lengths = job.index.num_positions.tolist()
    total = sum(lengths[row] for shard in shards.values() for batch in shard for row in batch)
    begin = time.perf_counter()
    with progress(total, desc="teacher", unit="token", show=show) as bar:
        for number, batches in shards.items():
            losses = []
            for batch in batches:
                losses.append(job.score([job.read(row) for row in batch]))
                bar.update(sum(lengths[row] for row in batch))
            if writer is not None:
                writer.write_shard(number, torch.cat(losses))
    return Throughput(total, time.perf_counter() - begin)


def _keep_up(job: TeacherJob, parts: list[dict[int, list[Batch]]], replica: int) -> None:
    """Score until as many batches are done as where there are most; the result is nobody's."""
    num_batches = [sum(map(len, part.values())) for part in parts]
    shortest = job.shards[-1][-1]
    for _ in range(max(num_batches) - num_batches[replica]):
        job.score([job.read(row) for row in shortest])
