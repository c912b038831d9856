"""The corpus of a run: the student, its data, and how samples become batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from regate_ds.algorithm.batch import host_labels
from regate_ds.data.collate import Batch, Collator, LoadedSample, SampleDataset
from regate_ds.data.llava.encode import Encoder
from regate_ds.data.llava.read import read_records
from regate_ds.data.llava.records import BadRecord, Record, SampleError
from regate_ds.data.llava.sample import EncodedSample
from regate_ds.families.table import family_of
from regate_ds.job.progress import progress
from regate_ds.job.ranks import is_first_rank
from regate_ds.recipe.config.sections import DataConfig
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.evaluation.words import HeldOut
from regate_ds.recipe.students.load import make_student
from regate_ds.recipe.students.student import Student
from regate_ds.stores.answer_index import AnswerIndex


@dataclass(frozen=True)
class Corpus:
    """A student and the data it is trained and tested on."""

    student: Student
    train_records: list[Record]
    test_records: list[Record]
    bad: list[BadRecord]
    """Records of both sets that `data.skip_bad` left out."""

    index: AnswerIndex
    """Index of the training set's answers."""

    encoder: Encoder
    collator: Collator

    @property
    def train(self) -> SampleDataset:
        return SampleDataset(self.train_records, self.encoder)

    @property
    def test(self) -> SampleDataset:
        return SampleDataset(self.test_records, self.encoder)


def load_corpus(config: RunConfig, *, weights: bool = True) -> Corpus:
    """Load or make the student, and read its data.

    Without ``weights`` the student is on "meta": it has shapes, but cannot run.
    """
    student = make_student(config.model, seed=config.run.seed if weights else None)
    family = family_of(student.model)
    if config.data.pack_length is not None and not family.packs:
        raise ValueError(
            f"data.pack_length={config.data.pack_length}: a {family.model_type} student has "
            f"{family.num_position_axes} position axes, which packed rows do not carry; set it to "
            "null"
        )
    data = config.data
    encoder = Encoder(
        student.tokenizer,
        image_token=student.image_token,
        num_image_tokens=student.vision.num_tokens,
        max_length=data.max_length,
        template=data.template,
    )
    train, bad, index = _read(data.train, data.name, data, encoder)
    test, bad_test, _ = _read(data.test, "test", data, encoder) if data.test else ([], [], None)
    collator = Collator(
        pad_id=student.pad_id,
        vision=student.vision,
        pack_length=data.pack_length,
    )
    return Corpus(student, train, test, bad + bad_test, index, encoder, collator)


class HostLabels:
    """Collates samples of a run without elision, with the host's own labels: the token *at* t."""

    def __init__(self, collator: Collator) -> None:
        self._collator = collator

    def __call__(self, samples: list[LoadedSample]) -> Batch:
        batch = self._collator(samples)
        return Batch({**batch.inputs, "labels": host_labels(batch.tokens.labels_BT)}, batch.tokens)


def _read(
    path: Path, name: str, data: DataConfig, encoder: Encoder
) -> tuple[list[Record], list[BadRecord], AnswerIndex]:
    """Read the records and encode each once; return the usable, the bad, and the usable's index.

    Without `data.skip_bad` the first bad record is an error.
    """
    records, bad = read_records(path, name=name, image_root=data.image_root, skip_bad=data.skip_bad)
    index = AnswerIndex.build(_encoded(records, name, encoder, bad if data.skip_bad else None))
    keys = set(index.keys)
    usable = [record for record in records if record.key in keys]
    if not usable:
        raise ValueError(
            f"{path} has no usable record, and training and testing need at least one; add samples "
            "to it, or set data.skip_bad=false to see what is wrong with those it has"
        )
    return usable, bad, index


def _encoded(
    records: Sequence[Record], name: str, encoder: Encoder, bad: list[BadRecord] | None
) -> Iterator[EncodedSample]:
    """Yield each record encoded. A bad record goes to ``bad``, or is an error if that is None."""
    show = os.environ.get("RANK", "0") == "0"
    with progress(len(records), desc=f"encode {name}", unit="record", show=show) as bar:
        for record in records:
            try:
                yield encoder.encode(record)
            except SampleError as error:
                if bad is None or error.bad is None:
                    raise
                bad.append(error.bad)
            bar.update()


def held_out(corpus: Corpus, config: RunConfig) -> HeldOut:
    """Return the corpus's held-out questions in the form that evaluation takes."""
    return HeldOut(
        records=corpus.test_records,
        encoder=corpus.encoder,
        tokenizer=corpus.student.tokenizer,
        vision=corpus.student.vision,
        num_workers=config.data.num_workers,
    )


def open_corpus(config: RunConfig, *, weights: bool = True) -> Corpus:
    """Load the corpus; the first rank prints which records were left out and how many were cut."""
    corpus = load_corpus(config, weights=weights)
    if corpus.bad and is_first_rank():
        print(f"data.skip_bad left out {len(corpus.bad)} bad records:")
        print("\n".join(f"  {bad}" for bad in corpus.bad), flush=True)
    if is_first_rank():
        report_cut(corpus, config.data.max_length)
    return corpus


def report_cut(corpus: Corpus, max_length: int) -> None:
    """Print how many training samples have the greatest length: their ends may have been cut."""
    num_full = int((corpus.index.num_positions >= max_length).sum())
    if num_full:
        print(
            f"{num_full} of {corpus.index.num_samples} training samples fill data.max_length="
            f"{max_length}: longer samples were cut to that length",
            flush=True,
        )
