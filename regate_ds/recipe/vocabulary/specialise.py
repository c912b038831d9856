"""`regate tokenizer`: a tokenizer of the training set's own text, and the student that reads by it.

A text of fewer tokens costs less before any of them is elided (Dagan et al., arXiv 2402.01035).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from regate_ds.data.collate import SampleDataset
from regate_ds.data.llava.raw import find_places, open_raw
from regate_ds.job.progress import progress
from regate_ds.parallel.layout import num_ranks
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.corpus import Corpus, corpus_encoder, open_corpus
from regate_ds.recipe.students.load import load_student
from regate_ds.recipe.students.student import Student, save_student
from regate_ds.recipe.vocabulary.bpe import added_ids, train_in_place_of
from regate_ds.recipe.vocabulary.pieces import old_pieces
from regate_ds.recipe.vocabulary.report import ALL, TextCount, count_of
from regate_ds.recipe.vocabulary.texts import texts_of
from regate_ds.recipe.vocabulary.transfer import renumber, transfer
from regate_ds.stores.atomic_file import make_folder, write_atomically

REPORT = "tokens.json"


def specialise(config: RunConfig, out: Path, *, size: int, by: str | None) -> dict[str, TextCount]:
    """Train the tokenizer on the training set, and write the student that reads by it into ``out``.

    by: field of the records by whose values tokens are counted apart. Returns the counts, which are
    also written beside the student. ValueError names what cannot get another vocabulary.
    """
    if num_ranks() > 1:
        raise ValueError(
            f"this job has {num_ranks()} ranks, and each would write the student; give the command "
            "to one process"
        )
    if config.model.path is None:
        raise ValueError(
            "model.path=None: a fresh student has nothing to carry over to another vocabulary; "
            "name a student's folder, or train its tokenizer before it is made"
        )
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise ValueError(f"--out {out}: is not empty; give another folder")
    corpus = open_corpus(config, weights=False)
    old: Any = corpus.student.tokenizer
    new = train_in_place_of(old, _texts(corpus), size=size)
    own = config.data.template is not None
    stored = load_student(config.model.path, dtype=None, own_template=own)
    student = _with_tokenizer(stored, new, old)
    counts = _counts(config, corpus, student, old, by)
    make_folder(out)
    save_student(student, out)
    report = {name: asdict(one) for name, one in counts.items()}
    write_atomically(out / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    return counts


def _texts(corpus: Corpus) -> Iterator[str]:
    student = corpus.student
    special = added_ids(student.tokenizer).union(student.placeholder_ids)
    for row in _rows_with_progress(len(corpus.train), "texts"):
        yield from texts_of(corpus.train.encode(row).input_ids_S, student.tokenizer, special)


def _rows_with_progress(total: int, what: str) -> Iterator[int]:
    with progress(total, desc=what, unit="sample") as bar:
        for number in range(total):
            yield number
            bar.update()


def _with_tokenizer(student: Student, new: Any, old: Any) -> Student:
    model: Any = student.model
    transfer(model, old_pieces(old, new))
    renumber(model.config, old, new)
    if model.generation_config is not None:
        renumber(model.generation_config, old, new)
    if student.has_chat_template:
        student.vision.processor.tokenizer = new
    return replace(student, tokenizer=new)


def _counts(
    config: RunConfig, corpus: Corpus, student: Student, old: Any, by: str | None
) -> dict[str, TextCount]:
    """Count the training set's tokens, encoded anew."""
    special = added_ids(old).union(corpus.student.placeholder_ids)
    anew = SampleDataset(corpus.train_records, corpus_encoder(student, config.data))
    path = config.data.train
    raw = None if by is None else open_raw(path, find_places(path))
    counts = {ALL: TextCount()}
    for row in _rows_with_progress(len(corpus.train), "tokens"):
        before, after = corpus.train.encode(row), anew.encode(row)
        one = count_of(before, after, texts_of(before.input_ids_S, old, special))
        counts[ALL].add(one)
        if raw is not None:
            value = raw[before.key[1]].get(by)
            counts.setdefault(f"{by}={value}", TextCount()).add(one)
    return counts
