"""The teacher inside the training job: losses of the micro-batches to come, one step ahead.

For data that no store can hold: streams, and augmentation that changes the labels or the number of
image tokens. To a session it is a store; ``DeepSpeedRegate.windows`` tells it which samples come.

Shapes: N label positions of the samples asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regate_ds.algorithm.batch import IGNORE, SampleKey
from regate_ds.data.collate import Batch
from regate_ds.data.llava.encode import EncodedSample
from regate_ds.parallel.collectives import gather_integers, gather_vectors
from regate_ds.parallel.layout import ProcessGroup, rank_in, size_of
from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.stores.reference.shard import LARGEST
from regate_ds.teacher.batching import by_length, cut_batches
from regate_ds.teacher.precompute import Score
from regate_ds.teacher.scoring import ScoredSample

Read = Callable[[Batch], Sequence[ScoredSample]]
"""The samples of a micro-batch as the teacher's score takes them."""


class OnlineReference:
    """Reference losses as they are needed; made by ``Teacher.online`` or the recipe."""

    def __init__(
        self,
        score: Score,
        read: Read,
        *,
        teacher_id: str,
        index: AnswerIndex | None = None,
        model: nn.Module | None = None,
    ) -> None:
        """``index``: of the data, where it is known beforehand and never changes. ``model``: the
        teacher's, to see that no training changes it."""
        self._score, self._read, self._index, self._model = score, read, index, model
        self.teacher_id = teacher_id
        self._losses: dict[SampleKey, Tensor] = {}
        self.seconds = 0.0
        """Of this rank, for the window that was scored last."""

    @property
    def is_stream(self) -> bool:
        """Whether nothing is known of the data beforehand."""
        return self._index is None

    @property
    def index(self) -> AnswerIndex:
        if self._index is None:
            raise ValueError(
                "this online teacher knows no data beforehand, which only `attach` for DeepSpeed "
                "loops can do; give it an index, or a ReferenceStore in its place"
            )
        return self._index

    def require_frozen(self, student: nn.Module) -> None:
        """Refuse, by ``ValueError``, a teacher that would learn with the student."""
        trained = {p.data_ptr(): n for n, p in student.named_parameters() if p.requires_grad}
        for name, weight in self._model.named_parameters() if self._model is not None else ():
            if weight.numel() and weight.data_ptr() in trained:
                raise ValueError(
                    f"the teacher's {name} is the student's own {trained[weight.data_ptr()]}, "
                    "which training changes; give the teacher a copy (copy.deepcopy)"
                )

    def prepare(self, window: Sequence[Batch]) -> None:
        """Score the samples of the window that is read next; it takes the place of the last one.
        All ranks that hold the teacher together call it."""
        begin = time.perf_counter()
        samples = {s.key: s for batch in window for s in self._read(batch)}
        losses_N = self._score(list(samples.values()))
        counts = [_num_labels(sample) for sample in samples.values()]
        # As a store would hand them out, so that a run is the same by either.
        parts = losses_N.half().float().split(counts)
        self._losses = dict(zip(samples, parts, strict=True))
        self.seconds = time.perf_counter() - begin

    def forget(self) -> None:
        """The coming window needs no losses: its step is dense."""
        self._losses, self.seconds = {}, 0.0

    def read(self, keys: Sequence[SampleKey]) -> Tensor:
        """fp32 [N] in nats, rounded to fp16: all label positions of these samples, in order.

        ValueError names a sample whose loss is not finite, or beyond what a store would hold.
        """
        return torch.cat([torch.empty(0), *(self._losses_of(key) for key in keys)])

    def _losses_of(self, key: SampleKey) -> Tensor:
        name, number = key
        if key not in self._losses:
            raise RuntimeError(
                f"no losses of sample {name!r} record {number} are there: an online teacher "
                "scores what `regate.windows(loader, engine)` of a DeepSpeed loop hands out"
            )
        losses_N = self._losses[key]
        # What is beyond the largest number of fp16 has become infinite.
        if not bool(losses_N.isfinite().all()):
            raise ValueError(
                f"the teacher's loss of sample {name!r} record {number} is not finite, or "
                f"beyond {LARGEST} nats; check the teacher's weights, or run it in bf16 or fp32"
            )
        return losses_N


@dataclass(frozen=True, kw_only=True)
class WindowScorer:
    """Scores any number of samples in batches of like length, on the ranks of the teacher."""

    score: Score

    tokens_per_batch: int
    """Upper limit of padded tokens in a forward pass; a longer sample is one of its own."""

    replica: ProcessGroup | None = None
    """Ranks that hold one teacher together: each of them scores the samples of all."""

    in_step: bool = False
    """Whether all ranks of the job must score equally often, as with ZeRO-3."""

    device: torch.device | str = "cpu"
    """Where the backend of the groups wants its tensors."""

    def __call__(self, samples: Sequence[ScoredSample]) -> Tensor:
        """fp32 [N]: losses of all label positions of these samples, in order."""
        everyones = self._gathered(samples)
        losses = self._score_batches([sample for part in everyones for sample in part])
        before = sum(len(part) for part in everyones[: rank_in(self.replica)])
        return torch.cat([torch.empty(0), *losses[before : before + len(samples)]])

    def _score_batches(self, samples: Sequence[ScoredSample]) -> list[Tensor]:
        lengths = torch.tensor([sample.input_ids_S.numel() for sample in samples])
        rows = by_length(torch.arange(len(samples)), lengths)
        batches = cut_batches(rows, lengths, self.tokens_per_batch)
        losses = [torch.empty(0)] * len(samples)
        for batch in batches:
            found_N = self.score([samples[row] for row in batch])
            parts = found_N.split([_num_labels(samples[row]) for row in batch])
            for row, part_N in zip(batch, parts, strict=True):
                losses[row] = part_N
        if self.in_step:
            # The shortest sample again, for no one, until all ranks have scored equally often.
            for _ in range(max(gather_integers(len(batches), self.device)) - len(batches)):
                self.score([samples[rows[-1]]])
        return losses

    def _gathered(self, samples: Sequence[ScoredSample]) -> list[Sequence[ScoredSample]]:
        """The samples of every rank of the replica, by rank."""
        if size_of(self.replica) == 1:
            return [samples]
        found = gather_vectors(_packed(samples), self.replica, self.device)
        return [_unpacked(vector) for vector in found]


def samples_of(batch: Batch, image_token_id: int | None) -> list[EncodedSample]:
    """The samples of a micro-batch by their token ids, in the order of its keys."""
    tokens, found = batch.tokens, []
    ids_BT = batch.inputs["input_ids"].cpu()
    for number, key in enumerate(tokens.flat_keys):
        is_own_BT = tokens.sample_BT == number
        ids_S = ids_BT[is_own_BT]
        is_placeholder_S = torch.zeros_like(ids_S, dtype=torch.bool)
        if image_token_id is not None:
            is_placeholder_S = ids_S == image_token_id
        labels_S = tokens.labels_BT[is_own_BT]
        found.append(EncodedSample(key, ids_S, labels_S, is_placeholder_S, (), ()))
    return found


def _num_labels(sample: ScoredSample) -> int:
    return int((sample.labels_S != IGNORE).sum())


def _packed(samples: Sequence[ScoredSample]) -> Tensor:
    """int64: for each sample its length, ids, labels and placeholders. Keys stay at home."""
    parts = [
        torch.cat([torch.tensor([len(s.input_ids_S)]), s.input_ids_S, s.labels_S, image_S.long()])
        for s in samples
        for image_S in [s.is_placeholder_S]
    ]
    return torch.cat([torch.empty(0, dtype=torch.int64), *parts])


def _unpacked(vector: Tensor) -> list[ScoredSample]:
    found: list[ScoredSample] = []
    while vector.numel():
        length = int(vector[0])
        ids_S, labels_S, is_image_S = vector[1 : 1 + 3 * length].view(3, length)
        found.append(EncodedSample(("", len(found)), ids_S, labels_S, is_image_S.bool(), (), ()))
        vector = vector[1 + 3 * length :]
    return found
