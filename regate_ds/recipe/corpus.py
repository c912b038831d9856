"""The corpus of a run: the student, its data, and how samples become batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regate_ds.algorithm.batch import host_labels
from regate_ds.data.axes import AxesOfSamples
from regate_ds.data.collate import Batch, Collator, LoadedSample, SampleDataset
from regate_ds.data.interfaces import RecordEncoder
from regate_ds.data.llava.encode import Encoder
from regate_ds.data.llava.raw import CACHE_NAME, data_folder
from regate_ds.data.llava.records import BadRecord, Record, bad_record
from regate_ds.data.llava.template import Template
from regate_ds.families.table import family_of
from regate_ds.job.ranks import is_first_rank
from regate_ds.recipe.cache.entry import DataSet, open_data
from regate_ds.recipe.cache.source import Source
from regate_ds.recipe.config.sections import DataConfig
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.evaluation.words import HeldOut
from regate_ds.recipe.students.load import make_student
from regate_ds.recipe.students.processor import chat_encoder
from regate_ds.recipe.students.stored import is_in_safetensors
from regate_ds.recipe.students.student import Student, fresh_model
from regate_ds.stores.answer_index import AnswerIndex


@dataclass(frozen=True)
class Corpus:
    """A student and the data it is trained and tested on."""

    student: Student
    train_set: DataSet
    test_set: DataSet | None
    encoder: RecordEncoder
    collator: Collator
    bad: list[BadRecord]
    """Records of both sets that `data.skip_bad` left out."""

    @property
    def index(self) -> AnswerIndex:
        """Index of the training set's answers."""
        return self.train_set.index

    @property
    def train_records(self) -> Sequence[Record]:
        return self.train_set.records

    @property
    def test_records(self) -> Sequence[Record]:
        return self.test_set.records if self.test_set else ()

    @property
    def train(self) -> SampleDataset:
        return SampleDataset(self.train_records, self.encoder, self.train_set)

    @property
    def test(self) -> SampleDataset:
        return SampleDataset(self.test_records, self.encoder, self.test_set)


def load_corpus(config: RunConfig, *, weights: bool = True) -> Corpus:
    """Load or make the student, and open its data, which is indexed where it has not been.

    Without ``weights`` the student is on "meta": it has shapes, but cannot run. Without
    `data.skip_bad` the first bad record is an error.
    """
    student = corpus_student(config, weights=weights)
    encoder = corpus_encoder(student, config.data)
    sets = [_open_set(source, config) for source in sources_of(config.data, encoder)]
    collator = Collator(
        pad_id=student.pad_id,
        vision=student.vision,
        pack_length=config.data.pack_length,
        axes=_axes_of(student) if config.data.pack_length is not None else None,
    )
    bad = [one for each in sets for one in each.bad]
    return Corpus(student, sets[0], sets[1] if sets[1:] else None, encoder, collator, bad)


def _axes_of(student: Student) -> AxesOfSamples | None:
    """Return what numbers packed samples where positions have several axes."""
    family: Any = family_of(student.model)
    if family.num_position_axes == 1:
        return None
    # Loader processes get a copy, so it is one without weights.
    bare: Any = fresh_model(type(student.model), student.model.config, seed=None)
    return AxesOfSamples(bare.model)


def corpus_student(config: RunConfig, *, weights: bool = True) -> Student:
    """Load or make the student for samples as `data.template` has them."""
    seed, own = config.run.seed if weights else None, config.data.template is not None
    return make_student(config.model, seed=seed, own_template=own)


def loads_whole(config: RunConfig) -> bool:
    """Return whether each rank of a training run needs the whole student at its start.

    Through Megatron-core it reads its part of the weights from safetensors. The tower is read
    whole to name it, where image tokens are ranked by its features; the decoder, where a copy of it
    is the online teacher.
    """
    if config.parallel is None or not is_in_safetensors(config.model):
        return True
    if config.scores_online and config.teacher.path is None:
        return True
    ranking = config.elision.stored_ranking
    return ranking is not None and ranking.reads != "pixels"


def corpus_encoder(student: Student, data: DataConfig) -> RecordEncoder:
    """Return what writes the records as the student's tokens."""
    if student.has_chat_template:
        return chat_encoder(
            student.vision.processor,
            student.image_token,
            max_length=data.max_length,
            video_frames=data.video_frames,
        )
    encoder = Encoder(
        student.tokenizer,
        image_token=student.image_token,
        num_image_tokens=student.vision.num_tokens,
        max_length=data.max_length,
        template=data.template or Template(),
    )
    # The positions of these models follow from the runs of placeholders.
    has_runs = family_of(student.model).num_position_axes > 1
    return encoder.with_images_apart() if has_runs else encoder


def sources_of(data: DataConfig, encoder: RecordEncoder) -> list[Source]:
    """Return the training set and, if there is one, the held-out set."""
    sets = [(data.train, data.name), *([(data.test, "test")] if data.test else [])]
    return [
        Source(path, name, data.image_root, encoder, data.video_frames, data.inside_root)
        for path, name in sets
    ]


def cache_folders(config: RunConfig, path: Path) -> list[Path]:
    """Return the folders that may hold the cache of a data file, in the order of preference.

    ValueError if the run would write files into a folder whose files are the data.
    """
    for key, own in (("data.cache", config.data.cache), ("run.out", config.run.out)):
        data = data_folder(path)
        if own and data and own.resolve().is_relative_to(data.resolve()):
            raise ValueError(
                f"{key}={own}: lies in {data}, whose files are the data; give a folder outside it"
            )
    if config.data.cache is not None:
        return [config.data.cache]
    return [(data_folder(path) or path).parent / CACHE_NAME, config.run.out / "data_cache"]


def _open_set(source: Source, config: RunConfig) -> DataSet:
    found = open_data(source, cache_folders(config, source.path))
    if found.bad and not config.data.skip_bad:
        raise bad_record(found.bad[0])
    if not found.records:
        raise ValueError(
            f"{source.path} has no usable record, and training and testing need at least one; add "
            "samples to it, or set data.skip_bad=false to see what is wrong with those it has"
        )
    return found


class HostLabels:
    """Collates samples of a run without elision, with the host's own labels: the token *at* t."""

    def __init__(self, collator: Collator) -> None:
        self._collator = collator

    def __call__(self, samples: list[LoadedSample]) -> Batch:
        batch = self._collator(samples)
        return Batch({**batch.inputs, "labels": host_labels(batch.tokens.labels_BT)}, batch.tokens)


def held_out(corpus: Corpus, config: RunConfig) -> HeldOut:
    """Return the corpus's held-out questions in the form that evaluation takes."""
    by_rows = {} if config.parallel is None else {"batch_size": config.run.micro_batch}
    return HeldOut(
        **by_rows,
        records=corpus.test_records,
        encoder=corpus.encoder,
        tokenizer=corpus.student.tokenizer,
        vision=corpus.student.vision,
        num_workers=config.data.num_workers,
        indexed=corpus.test_set,
    )


def open_corpus(config: RunConfig, *, weights: bool = True) -> Corpus:
    """Load the corpus; the first rank prints which records were left out and how many were cut."""
    corpus = load_corpus(config, weights=weights)
    if corpus.bad and is_first_rank():
        print(f"data.skip_bad left out {len(corpus.bad)} bad records:")
        print("\n".join(f"  {bad}" for bad in corpus.bad), flush=True)
    if is_first_rank():
        report_writer(corpus.student)
        report_cut(corpus, config.data.max_length)
    return corpus


def report_writer(student: Student) -> None:
    """Print what writes the samples, where it is not the package's own template."""
    if student.has_chat_template:
        name = type(student.vision.processor).__name__
        print(f"samples are written by the chat template of the model's {name}", flush=True)


def report_cut(corpus: Corpus | DataSet, max_length: int) -> None:
    """Print how many training samples have the greatest length: their ends may have been cut."""
    num_full = int((corpus.index.num_positions >= max_length).sum())
    if num_full:
        print(
            f"{num_full} of {corpus.index.num_samples} training samples fill data.max_length="
            f"{max_length}: longer samples were cut to that length",
            flush=True,
        )
