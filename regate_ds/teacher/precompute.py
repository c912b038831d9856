"""Score a whole data set once with the teacher, in a job that can be resumed.

Batches and shards depend on the data and the token limit alone. So any number of ranks, and a job
that was killed and started again, end with the same files, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regate_ds.algorithm.scores.score import Column
from regate_ds.job.progress import progress
from regate_ds.job.read_ahead import read_ahead
from regate_ds.parallel.layout import ProcessGroup, rank_in, size_of
from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.stores.reference.lifecycle import begin_store, is_complete
from regate_ds.stores.reference.writer import ReferenceWriter
from regate_ds.stores.shard_job import fill_store
from regate_ds.stores.shares import share_out
from regate_ds.teacher.batching import RowBatch, cut_batches, cut_places, cut_shards, padded_tokens
from regate_ds.teacher.scoring import ScoredSample
from regate_ds.teacher.throughput import NUM_MEASURED, Throughput, measurable, measure_share

ScoreSamples = Callable[[Sequence[ScoredSample]], Tensor]
"""Returns the values in nats of all label positions of the samples, in order: fp32 [N]."""


@dataclass(frozen=True, kw_only=True)
class TeacherJob:
    """What is scored, by which teacher, and where the losses are stored."""

    index: AnswerIndex
    """Index of all samples of the data."""

    encode: Callable[[int], ScoredSample]
    """Returns the sample of a row of the index."""

    score: ScoreSamples
    teacher_id: str
    """Name of the teacher in the store."""

    store: Path
    """Folder of the store."""

    tokens_per_batch: int
    """Upper limit of padded tokens in a batch; a longer sample is a batch of its own."""

    column: Column = "text"
    """What ``score`` returns."""

    ranks_per_replica: int = 1
    """Number of consecutive ranks that hold one teacher together: they score the same batches, and
    the first of them writes."""

    in_step: bool = False
    """Whether all ranks must score equally often, as with ZeRO-3."""

    plain: Callable[[Sequence[ScoredSample]], Any] | None = None
    """Runs the model's own forward pass over the samples and waits for the device, to compare the
    speed; None leaves the comparison out."""

    @property
    def subject(self) -> str:
        """The data and the teacher, by name."""
        return f"data with fingerprint {self.index.fingerprint[:12]} and teacher {self.teacher_id}"

    @property
    def settings(self) -> str:
        return f"tokens_per_batch={self.tokens_per_batch}"

    @property
    def is_complete(self) -> bool:
        """Whether the store is finished. ValueError if it is damaged, or not this job's."""
        return is_complete(self.store, self.index, self.teacher_id, self.column)

    def begin(self) -> None:
        """Make the store ready for writers."""
        lengths, limit = self.index.num_positions, self.tokens_per_batch
        cut = partial(cut_shards, num_positions=lengths, tokens_per_batch=limit)
        begin_store(self.store, self.index, self.teacher_id, cut, limit, self.column)

    def writer(self) -> ReferenceWriter:
        """Open the store for writing."""
        return ReferenceWriter(self.store, self.index)

    def batches(self, rows_R: Tensor) -> list[RowBatch]:
        """Cut a shard's rows into batches."""
        return cut_batches(rows_R, self.index.num_positions, self.tokens_per_batch)

    def read(self, row: int) -> ScoredSample:
        """Read the sample of a row. ValueError if it is not what the index was built from."""
        sample = self.encode(row)
        if not self.index.holds(sample, row):
            raise ValueError(
                f"row {row} of the answer index is sample {self.index.keys[row]}, the data gives "
                f"{sample.key} with other tokens or labels; build the index and the samples from "
                "the same data, which must not change from one reading to the next"
            )
        return sample

    def read_batch(self, rows: RowBatch) -> list[ScoredSample]:
        return [self.read(row) for row in rows]


def precompute(
    job: TeacherJob, group: ProcessGroup | None = None, device: torch.device | str = "cpu"
) -> Throughput:
    """Score every sample and write the job's store; shards that exist are not scored again.

    Every rank of ``group`` makes this call; ``device`` is where the group's backend wants tensors.
    ValueError if the folder holds a store of other data, another teacher or other batches,
    RuntimeError if the ranks' jobs differ.
    """
    filled = fill_store(job, partial(_score_missing, job, group), group, device)
    if filled is None:
        return Throughput(0, 0.0)
    (busy, rows_R), seconds = filled
    num_tokens = int(job.index.num_positions[rows_R].sum())
    return Throughput(num_tokens, seconds, busy / max(seconds, 1e-9), _measure(job, rows_R))


def _score_missing(
    job: TeacherJob, group: ProcessGroup | None, writer: ReferenceWriter, missing: list[int]
) -> tuple[float, Tensor]:
    """Score the missing shards; return the seconds this rank's teacher worked, and the rows that
    all ranks scored."""
    batches = (job.batches(writer.rows(number)) for number in missing)
    found = [(padded_tokens(each, job.index.num_positions), len(each)) for each in batches]
    # Share out what is missing, not all shards: a replica that is far ahead would wait for hours.
    replica, place = divmod(rank_in(group), job.ranks_per_replica)
    parts = share_out([cost for cost, _ in found], size_of(group) // job.ranks_per_replica)
    mine = [missing[i] for i in parts[replica]]
    busy = _score_shards(job, writer, mine, writes=place == 0, show=rank_in(group) == 0)
    if job.in_step:
        _score_as_often(job, [sum(found[i][1] for i in part) for part in parts], replica)
    none = torch.empty(0, dtype=torch.int64)
    return busy, torch.cat([none, *(writer.rows(number) for number in missing)])


def _score_shards(
    job: TeacherJob,
    writer: ReferenceWriter,
    numbers: list[int],
    *,
    writes: bool,
    show: bool,
) -> float:
    lengths_S, busy = job.index.num_positions, 0.0
    total = sum(int(lengths_S[writer.rows(number)].sum()) for number in numbers)
    with progress(total, desc="teacher", unit="token", show=show) as bar:
        # Cut shard by shard: the batches of all of them would be a number in Python for each row.
        samples_of = read_ahead(
            job.read_batch,
            (each for number in numbers for each in job.batches(writer.rows(number))),
        )
        for number in numbers:
            losses = []
            for batch in job.batches(writer.rows(number)):
                samples = next(samples_of)
                begin = time.perf_counter()
                losses.append(job.score(samples))
                busy += time.perf_counter() - begin
                bar.update(int(lengths_S[batch].sum()))
            if writes:
                writer.write_shard(number, torch.cat(losses))
    return busy


def _score_as_often(job: TeacherJob, num_batches: list[int], replica: int) -> None:
    """Score the shortest sample until this rank has scored as often as the one with most batches.

    Nobody uses these losses.
    """
    shortest = [int(job.index.num_positions.argmin())]
    for _ in range(max(num_batches) - num_batches[replica]):
        job.score([job.read(row) for row in shortest])


def _measure(job: TeacherJob, rows_R: Tensor) -> float | None:
    """Measure the speed against the plain forward pass, on a few batches, the same on all ranks."""
    if job.plain is None:
        return None
    lengths_S = job.index.num_positions
    batches = cut_places(rows_R, lengths_S, job.tokens_per_batch)
    middle = [(2 * n + 1) * len(batches) // (2 * NUM_MEASURED) for n in range(NUM_MEASURED)]
    places = [batches[number] for number in middle if batches]
    chosen = [measurable(rows_R[start:end].tolist(), lengths_S) for start, end in places]
    samples = [[job.read(row) for row in rows] for rows in chosen if rows]
    return measure_share(samples, job.score, job.plain)
