"""Count the words of held-out answers that the dense model gets right, teacher-forced.

A word (a piece of the answer between spaces) is right if the argmax is right at all of its tokens,
each given the true words before it. It is visual if it overlaps a gold span: it needs the image.

Shapes: N label positions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from regate_ds.data.collate import Batch, Collator, Indexed, LoadedSample, SampleDataset
from regate_ds.data.interfaces import RecordEncoder, VisionInputs
from regate_ds.data.llava.records import Record, Turn
from regate_ds.data.llava.sample import EncodedSample
from regate_ds.job.preemption import leave_to_parent
from regate_ds.job.process import Process
from regate_ds.parallel.collectives import sum_over
from regate_ds.recipe.evaluation.forward import Predict, dense_inference, predict

WORD = re.compile(r"\S+")

_MICRO = 1_000_000
"""Ranks add up integers, so they send losses in millionths of a nat."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Questions with known answers, and how they become micro-batches of one sample a row."""

    records: Sequence[Record]
    encoder: RecordEncoder
    tokenizer: Any
    vision: VisionInputs | None
    batch_size: int = 16
    num_workers: int = 0
    indexed: Indexed | None = None
    """What is known of the samples, which must not have changed."""

    @property
    def pad_id(self) -> int:
        """Id of padding; it is never seen, so eos stands in where the tokenizer has no pad."""
        pad_id = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad_id is None else pad_id


@dataclass(frozen=True)
class Tally:
    """Words counted and found right, and the loss over their tokens."""

    right_visual: int = 0
    num_visual: int = 0
    right_plain: int = 0
    num_plain: int = 0
    micro_nats: int = 0
    num_tokens: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(a + b for a, b in zip(self.counts, other.counts)))

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(vars(self).values())


@dataclass(frozen=True)
class Word:
    """A word of an answer; [start, end) counts the answer's characters."""

    start: int
    end: int
    is_visual: bool


Scores = dict[str, float | int | None]


def evaluate(model: nn.Module, held_out: HeldOut, process: Process) -> Scores:
    """Run every held-out sample through the dense model once. Collective.

    The model, its random state and its train mode are left as they were. Returns what
    ``evaluate_by`` does.
    """
    with dense_inference(model):
        return evaluate_by(partial(predict, model), held_out, process)


def evaluate_by(predict: Predict, held_out: HeldOut, process: Process) -> Scores:
    """Ask for the answers to every held-out sample once; ``process`` says this rank's share.

    Collective. Returns ``accuracy_visual`` and ``accuracy_plain`` (None if there are no such
    words), ``loss`` (mean over answer tokens, nats) and ``num_words_visual``, ``num_words_plain``,
    the same on all ranks.
    """
    tally = Tally()
    for samples, batch, is_counted in _batches(held_out, process):
        found = _run(predict, held_out.records, samples, batch.to(process.device))
        tally = tally + found if is_counted else tally
    total = Tally(*sum_over(tally.counts, process.group, process.device))
    return {
        "accuracy_visual": ratio(total.right_visual, total.num_visual),
        "accuracy_plain": ratio(total.right_plain, total.num_plain),
        "loss": total.micro_nats / _MICRO / max(1, total.num_tokens),
        "num_words_visual": total.num_visual,
        "num_words_plain": total.num_plain,
    }


def ratio(part: int, whole: int) -> float | None:
    """Return ``part / whole``, or None if nothing was counted."""
    return part / whole if whole else None


def words_of(turn: Turn) -> list[Word]:
    """Cut an answer at its spaces."""
    return [
        Word(
            start=match.start(),
            end=match.end(),
            is_visual=any(a < match.end() and match.start() < b for a, b in turn.gold_spans),
        )
        for match in WORD.finditer(turn.answer)
    ]


def tally_words(turns: Sequence[Turn], sample: EncodedSample, is_right_N: Sequence[bool]) -> Tally:
    """Judge each word by its tokens."""
    tally = Tally()
    for number, turn in enumerate(turns):
        for word, tokens in counted_words(turn, number, sample):
            tally += _one_word(word.is_visual, all(is_right_N[token] for token in tokens))
    return tally


def counted_words(turn: Turn, number: int, sample: EncodedSample) -> list[tuple[Word, list[int]]]:
    """Return the words of turn ``number`` that count, each with its label positions' numbers.

    A word without a token after it does not count: the sample's end may have cut it, even within a
    character. Neither does a word without tokens.
    """
    spans = [(n, a, b) for n, (turn_of, a, b) in enumerate(sample.char_spans) if turn_of == number]
    last = max((start for _, start, _ in spans), default=0)
    words = [
        (word, [n for n, start, end in spans if start < word.end and word.start < end])
        for word in words_of(turn)
        if word.end <= last
    ]
    return [(word, tokens) for word, tokens in words if tokens]


def _one_word(is_visual: bool, is_right: bool) -> Tally:
    if is_visual:
        return Tally(right_visual=int(is_right), num_visual=1)
    return Tally(right_plain=int(is_right), num_plain=1)


def share_of_process(
    has_images: Sequence[bool], process: Process, batch_size: int
) -> list[tuple[list[int], bool]]:
    """Cut this rank's share into batches of sample numbers, each with whether it counts.

    ``has_images`` says of each sample whether the model gets images with it. All ranks get equally
    many batches, and the n-th has images on all ranks or on none: under ZeRO-3 every rank must run
    the same modules equally often. A rank without further samples repeats one, which does not
    count.
    """
    batches: list[tuple[list[int], bool]] = []
    for wanted in (True, False):
        numbers = [i for i, found in enumerate(has_images) if found == wanted]
        own = numbers[process.rank :: process.world_size]
        for start in range(0, -(-len(numbers) // process.world_size), batch_size):
            batch = own[start : start + batch_size]
            batches.append((batch or numbers[:1], bool(batch)))
    return batches


def _batches(
    held_out: HeldOut, process: Process
) -> Iterator[tuple[list[tuple[int, EncodedSample]], Batch, bool]]:
    """Yield the record number and encoding of each row, the batch, and whether it counts."""
    has_images = [bool(record.images) for record in held_out.records]
    batches = share_of_process(has_images, process, held_out.batch_size)
    loader = DataLoader(
        SampleDataset(held_out.records, held_out.encoder, held_out.indexed),
        batch_sampler=[numbers for numbers, _ in batches],
        collate_fn=_Joined(Collator(pad_id=held_out.pad_id, vision=held_out.vision)),
        num_workers=held_out.num_workers,
        # Without this generator, the loader would draw a seed from the run's random state.
        generator=torch.Generator(),
        worker_init_fn=leave_to_parent,
    )
    for (numbers, is_counted), (encoded, batch) in zip(batches, loader):
        yield list(zip(numbers, encoded)), batch, is_counted


@dataclass(frozen=True)
class _Joined:
    """Collates, and also returns the encoded samples, which say where each token stands."""

    collator: Collator

    def __call__(self, samples: list[LoadedSample]) -> tuple[list[EncodedSample], Batch]:
        return [sample.encoded for sample in samples], self.collator(samples)


def _run(
    predict: Predict,
    records: Sequence[Record],
    samples: list[tuple[int, EncodedSample]],
    batch: Batch,
) -> Tally:
    is_right_N, loss_N = predict(batch)
    tally = Tally(micro_nats=round(float(loss_N.sum()) * _MICRO), num_tokens=loss_N.numel())
    parts = is_right_N.split(batch.tokens.num_labels_per_sample)
    for (number, encoded), part in zip(samples, parts):
        tally += tally_words(records[number].turns, encoded, part.tolist())
    return tally
