"""Run the teacher inside the training job: it scores each window just before its step.

This serves data that no store can hold: streams, and augmentation that changes the labels or the
number of image tokens. A session reads it like a store; ``LoopRegate.windows`` gives it the
samples to score.

Shapes: S positions of one sample, N label positions of the samples asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regate_ds.algorithm.batch import IGNORE, SampleKey, number_runs
from regate_ds.algorithm.scores.score import Column
from regate_ds.data.collate import Batch
from regate_ds.data.llava.sample import EncodedSample
from regate_ds.parallel.collectives import gather_integers, gather_values, gather_vectors
from regate_ds.parallel.layout import ProcessGroup, rank_in, size_of
from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.stores.reference.shard import LARGEST
from regate_ds.teacher.batching import by_length, cut_batches
from regate_ds.teacher.precompute import ScoreSamples
from regate_ds.teacher.scoring import ScoredSample

Read = Callable[[Batch], Sequence[ScoredSample]]
"""Returns the samples of a micro-batch as the teacher's score takes them."""


class OnlineReference:
    """Reference losses computed while training; ``Teacher.online`` or the recipe makes them."""

    def __init__(
        self,
        score: ScoreSamples,
        read: Read,
        *,
        teacher_id: str,
        index: AnswerIndex | None = None,
        model: nn.Module | None = None,
    ) -> None:
        """Set up the scoring.

        index: the answer index of the data, if the data is known beforehand and never changes.
        model: the teacher's, so that ``require_frozen`` can see whether training changes it.
        """
        self._score, self._read, self._index, self._model = score, read, index, model
        self.teacher_id = teacher_id
        self._losses: dict[SampleKey, Tensor] = {}
        self.seconds = 0.0
        """Seconds that this rank spent on scoring the last window."""

    @property
    def is_stream(self) -> bool:
        """Whether the data is not known beforehand, so that there is no index."""
        return self._index is None

    @property
    def index(self) -> AnswerIndex:
        """Answer index of the data. ValueError if there is none."""
        if self._index is None:
            raise ValueError(
                "this online teacher knows no data beforehand, which only `attach` for DeepSpeed "
                "loops supports; give it an index, or use a ReferenceStore in its place"
            )
        return self._index

    def require_frozen(self, student: nn.Module) -> None:
        """Refuse, by ``ValueError``, a teacher that shares a trained weight with the student."""
        trained = {p.data_ptr(): n for n, p in student.named_parameters() if p.requires_grad}
        for name, weight in self._model.named_parameters() if self._model is not None else ():
            if weight.numel() and weight.data_ptr() in trained:
                raise ValueError(
                    f"the teacher's {name} is the student's own {trained[weight.data_ptr()]}, "
                    "which training changes; give the teacher a copy (copy.deepcopy)"
                )

    def require_column(self, column: Column | None) -> None:
        """Refuse, by ``ValueError``, a run that reads another column; None reads none."""
        if column not in (None, "text"):
            raise ValueError(
                f"the score reads the column {column}, but an online teacher gives text alone; "
                f"run `regate teacher` with teacher.column={column}, and give ReferenceStore(path)"
            )

    def prepare(self, window: Sequence[Batch], shared: ProcessGroup | None = None) -> None:
        """Score the samples of the window that is read next; forget those of the one before.

        shared: ranks that all give this window, on a backend for CPU memory. Each scores its share
            of the samples, and all of them get all losses.

        All ranks that hold the teacher together, and those of ``shared``, make this call.
        """
        begin = time.perf_counter()
        samples = {s.key: s for batch in window for s in self._read(batch)}
        by_rank = _dealt(list(samples.values()), size_of(shared))
        own = by_rank[rank_in(shared)]
        # A teacher on several ranks needs all of them: one without a share scores for nothing.
        losses_N = self._score(own or list(samples.values())[:1])
        counts = [sum(map(_num_labels, part)) for part in by_rank]
        found = gather_values(losses_N[: counts[rank_in(shared)]], counts, shared)
        # Round as a store does, so that a run is the same with either.
        self._losses = {
            sample.key: part_N
            for part, values_N in zip(by_rank, found, strict=True)
            for sample, part_N in zip(
                part, values_N.half().float().split([*map(_num_labels, part)]), strict=True
            )
        }
        self.seconds = time.perf_counter() - begin

    def forget(self) -> None:
        """Forget all losses, because the coming step is dense and needs none."""
        self._losses, self.seconds = {}, 0.0

    def read(self, keys: Sequence[SampleKey]) -> Tensor:
        """Return fp32 [N]: the losses in nats, rounded to fp16, of these samples, in this order.

        ValueError names a sample whose loss is not finite, or larger than a store can hold.
        RuntimeError names a sample that was not scored.
        """
        return torch.cat([torch.empty(0), *(self._losses_of(key) for key in keys)])

    def _losses_of(self, key: SampleKey) -> Tensor:
        name, number = key
        if key not in self._losses:
            raise RuntimeError(
                f"no losses of sample {name!r} record {number} are there: an online teacher scores "
                "only the samples of `regate.windows(loader, engine)`; take micro-batches from it"
            )
        losses_N = self._losses[key]
        # A loss larger than any fp16 number has become infinite.
        if not bool(losses_N.isfinite().all()):
            raise ValueError(
                f"the teacher's loss of sample {name!r} record {number} is not finite, or "
                f"beyond {LARGEST} nats; check the teacher's weights, or run it in bf16 or fp32"
            )
        return losses_N


@dataclass(frozen=True, kw_only=True)
class WindowScorer:
    """Scores any number of samples in batches of similar length, on all ranks of a teacher."""

    score: ScoreSamples

    tokens_per_batch: int
    """Upper limit of padded tokens in a forward pass; a longer sample gets a pass of its own."""

    replica: ProcessGroup | None = None
    """Ranks that hold one teacher together: each of them scores the samples of all of them."""

    in_step: bool = False
    """Whether all ranks of the job must score equally often, as with ZeRO-3."""

    device: torch.device | str = "cpu"
    """Device on which the backend of the groups wants its tensors."""

    def __call__(self, samples: Sequence[ScoredSample]) -> Tensor:
        """Return fp32 [N]: the losses of all label positions of these samples, in order."""
        by_rank = self._gathered(samples)
        losses = self._score_batches([sample for part in by_rank for sample in part])
        before = sum(len(part) for part in by_rank[: rank_in(self.replica)])
        return torch.cat([torch.empty(0), *losses[before : before + len(samples)]])

    def _score_batches(self, samples: Sequence[ScoredSample]) -> list[Tensor]:
        lengths = torch.tensor([sample.input_ids_S.numel() for sample in samples])
        rows_R = by_length(torch.arange(len(samples)), lengths)
        batches = cut_batches(rows_R, lengths, self.tokens_per_batch)
        losses = [torch.empty(0)] * len(samples)
        for batch in batches:
            found_N = self.score([samples[row] for row in batch])
            parts = found_N.split([_num_labels(samples[row]) for row in batch])
            for row, part_N in zip(batch, parts, strict=True):
                losses[row] = part_N
        if self.in_step:
            # Score the shortest sample again, unused, until all ranks have scored equally often.
            for _ in range(max(gather_integers(len(batches), self.device)) - len(batches)):
                self.score([samples[int(rows_R[-1])]])
        return losses

    def _gathered(self, samples: Sequence[ScoredSample]) -> list[Sequence[ScoredSample]]:
        """Return the samples of every rank of the replica, by rank."""
        if size_of(self.replica) == 1:
            return [samples]
        found = gather_vectors(_packed(samples), self.replica, self.device)
        return [_unpacked(vector) for vector in found]


def samples_of(batch: Batch, placeholder_ids: Sequence[int]) -> list[EncodedSample]:
    """Return the samples of a micro-batch, in the order of its keys.

    placeholder_ids: token ids of the placeholders of images and videos.
    """
    ids_P = torch.tensor(placeholder_ids, dtype=torch.int64)
    tokens, samples = batch.tokens, []
    ids_BT = batch.inputs["input_ids"].cpu()
    for number, key in enumerate(tokens.flat_keys):
        is_in_sample_BT = tokens.sample_BT == number
        ids_S = ids_BT[is_in_sample_BT]
        image_S = number_runs(torch.isin(ids_S, ids_P))
        labels_S = tokens.labels_BT[is_in_sample_BT]
        samples.append(EncodedSample(key, ids_S, labels_S, image_S, (), ()))
    return samples


def _dealt(samples: list[ScoredSample], num_ranks: int) -> list[list[ScoredSample]]:
    """Deal samples out to ranks, the longest first, so that the shares cost about the same."""
    if num_ranks == 1:
        return [samples]
    ordered = sorted(samples, key=lambda sample: sample.input_ids_S.numel(), reverse=True)
    return [ordered[rank::num_ranks] for rank in range(num_ranks)]


def _num_labels(sample: ScoredSample) -> int:
    return int((sample.labels_S != IGNORE).sum())


def _packed(samples: Sequence[ScoredSample]) -> Tensor:
    """Return int64: for each sample its length, ids, labels and placeholders, without its key."""
    parts = [
        torch.cat([torch.tensor([len(s.input_ids_S)]), s.input_ids_S, s.labels_S, image_S.long()])
        for s in samples
        for image_S in [s.is_placeholder_S]
    ]
    return torch.cat([torch.empty(0, dtype=torch.int64), *parts])


def _unpacked(vector: Tensor) -> list[ScoredSample]:
    """Return the samples of ``_packed``, with made-up keys."""
    samples: list[ScoredSample] = []
    while vector.numel():
        length = int(vector[0])
        ids_S, labels_S, is_image_S = vector[1 : 1 + 3 * length].view(3, length)
        key = "", len(samples)
        samples.append(EncodedSample(key, ids_S, labels_S, is_image_S - 1, (), ()))
        vector = vector[1 + 3 * length :]
    return samples
