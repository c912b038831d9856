"""A teacher of another tokenizer in the recipe."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from regate_ds.job.process import Process
from regate_ds.recipe.config.tree import RunConfig, load_config
from regate_ds.recipe.corpus import load_corpus
from regate_ds.recipe.online_teacher import open_online
from regate_ds.recipe.teacher import teacher_text
from regate_ds.stores.reference.reader import ReferenceStore
from regate_ds.teacher.identity import teacher_id
from regate_ds.teacher.loading import load_teacher
from regate_ds.teacher.precompute import TeacherJob, precompute
from regate_ds.teacher.scoring import score_samples
from tests.support.models import causal_lm
from tests.support.small_corpus import make_corpus
from tests.teacher.two_tokenizers_helper import by_pieces


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, num_train=6, num_test=1)
    tokenizer = by_pieces()
    causal_lm(vocab_size=len(tokenizer)).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    return folder


def config_of(folder: Path, *overrides: str) -> RunConfig:
    return load_config(folder / "run.yaml", [f"teacher.path={folder / 'teacher'}", *overrides])


def test_another_tokenizer_is_refused_unless_it_is_asked_for(folder):
    config = config_of(folder)
    with pytest.raises(ValueError, match="does not fit the student's: .*teacher.tokenizer=own"):
        teacher_text(config.teacher, load_corpus(config, weights=False))


def test_a_teacher_with_its_own_tokenizer_fills_a_store_of_the_students_labels(folder):
    config = config_of(folder, "teacher.tokenizer=own")
    corpus = load_corpus(config, weights=False)
    text, teacher = teacher_text(config.teacher, corpus), load_teacher(folder / "teacher")
    score = text.scores(partial(score_samples, teacher, pad_id=text.pad_id))
    job = TeacherJob(
        index=corpus.index,
        encode=text.encode,
        score=score,
        teacher_id=text.name("small"),
        store=folder / "store",
        tokens_per_batch=256,
    )
    precompute(job)
    store = ReferenceStore(job.store)
    assert store.teacher_id.startswith("small-")
    for row, key in enumerate(corpus.index.keys):
        # fp16 in the store, and sums over other lengths in the batch.
        expected_N = score([text.encode(row)])
        torch.testing.assert_close(store.read([key]), expected_N, rtol=2**-11, atol=1e-5)
        total = score_samples(
            teacher, [text.writer.write(corpus.train_records[row]).teacher], pad_id=2
        )
        assert float(expected_N.sum()) == pytest.approx(float(total.sum()), rel=1e-5)


def test_online_the_same_teacher_reads_the_records_of_a_micro_batch(folder):
    config = config_of(folder, "teacher.tokenizer=own", "teacher.mode=online")
    corpus = load_corpus(config)
    online = open_online(config.teacher, corpus, Process(0, 1, torch.device("cpu")))
    batch = corpus.collator([corpus.train[number] for number in (4, 1)])
    online.prepare([batch])
    text, teacher = teacher_text(config.teacher, corpus), load_teacher(folder / "teacher")
    expected_N = text.scores(partial(score_samples, teacher, pad_id=text.pad_id))(
        [text.encode(4), text.encode(1)]
    )
    found_N = online.read(batch.tokens.flat_keys)
    torch.testing.assert_close(found_N, expected_N, rtol=1e-3, atol=1e-3)
    assert online.teacher_id == text.name(teacher_id(teacher, pad_id=text.pad_id))


def test_online_the_students_backbone_is_a_copy_from_before_training(folder):
    config = load_config(folder / "run.yaml", ["teacher.mode=online"])
    corpus = load_corpus(config)
    online = open_online(config.teacher, corpus, Process(0, 1, torch.device("cpu")))
    online.require_frozen(corpus.student.model)
    batch = corpus.collator([corpus.train[number] for number in (4, 1)])
    online.prepare([batch])
    before_N = online.read(batch.tokens.flat_keys)
    with torch.no_grad():
        for parameter in corpus.student.model.parameters():
            parameter.add_(1.0)
    online.prepare([batch])
    assert torch.equal(online.read(batch.tokens.flat_keys), before_N)


def test_the_students_own_backbone_has_no_tokenizer_of_its_own(folder):
    with pytest.raises(ValueError, match=r"teacher\.tokenizer='own': needs a teacher of its own"):
        load_config(folder / "run.yaml", ["teacher.tokenizer=own"])
