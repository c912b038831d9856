"""The columns of a reference store: what `regate teacher` computes, and who refuses which."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from regate_ds.adapters.computed import Computed
from regate_ds.algorithm.scores.excess_loss import ExcessLoss
from regate_ds.algorithm.scores.gain import Gain
from regate_ds.config import RegateConfig
from regate_ds.data.collate import Collator
from regate_ds.job.process import Process
from regate_ds.recipe.computed import open_computed
from regate_ds.recipe.config.tree import RunConfig, load_config
from regate_ds.recipe.corpus import Corpus, load_corpus
from regate_ds.recipe.estimate.plan_walk import walk_plan
from regate_ds.recipe.reports import store as report
from regate_ds.recipe.reports.sample import picture_sample
from regate_ds.recipe.teacher_job import teacher_job
from regate_ds.stores.reference.manifest import Manifest
from regate_ds.stores.reference.reader import ReferenceStore
from regate_ds.teacher.config import TeacherConfig
from regate_ds.teacher.online import OnlineReference
from regate_ds.teacher.precompute import precompute
from tests.support.small_corpus import make_corpus

ALONE = Process(0, 1, torch.device("cpu"))
SCORES = {
    "text": [],
    "student": ["elision.score=excess_loss", "elision.excess_loss.reference=student"],
    "gain": ["elision.score=gain"],
}


def config_of(folder: Path, column: str, *overrides: str) -> RunConfig:
    given = [f"teacher.column={column}", f"teacher.store={folder / column}"]
    return load_config(folder / "run.yaml", [*given, *SCORES[column], *overrides])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus of six samples and a store of each column."""
    folder = tmp_path_factory.mktemp("columns")
    make_corpus(folder, num_train=6, num_test=1)
    for column in SCORES:
        config = config_of(folder, column, "teacher.tokens_per_batch=256")
        precompute(teacher_job(config, load_corpus(config), ALONE))
    return folder


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Corpus:
    return load_corpus(config_of(folder, "text"))


def plain_losses(corpus: Corpus, number: int) -> list[float]:
    """The losses of one sample, from the whole logits of the host's own forward pass."""
    sample = corpus.train[number]
    collator = Collator(pad_id=corpus.student.pad_id, vision=corpus.student.vision)
    with torch.no_grad():
        logits_TV = corpus.student.model(**collator([sample]).inputs).logits[0]
    labels = sample.encoded.labels_S.tolist()
    return [
        float(logits_TV[t].logsumexp(0) - logits_TV[t, y]) for t, y in enumerate(labels) if y >= 0
    ]


def test_each_column_holds_what_its_name_says(folder: Path, corpus: Corpus):
    stores = {column: ReferenceStore(folder / column, verify="full") for column in SCORES}
    assert {column: store.column for column, store in stores.items()} == {c: c for c in SCORES}
    for number, key in enumerate(corpus.index.keys):
        text_N, student_N, gain_N = (stores[column].read([key]) for column in SCORES)
        # fp16 in the stores: of losses up to 8 nats each may be off by 2**-8, one unit.
        near = {"rtol": 2**-11, "atol": 2e-5}
        torch.testing.assert_close(student_N, torch.tensor(plain_losses(corpus, number)), **near)
        torch.testing.assert_close(gain_N, text_N - student_N, rtol=2**-11, atol=6e-3)
        assert not torch.equal(text_N, student_N)
    assert bool((stores["gain"].read(corpus.index.keys) < 0).any())


def test_names_of_teachers_tell_the_columns_apart(folder: Path):
    text, student, gain = (ReferenceStore(folder / column).teacher_id for column in SCORES)
    assert student.startswith("student-llava-")
    assert gain == f"gain-{text}-{student}"


def test_the_file_of_a_text_only_teacher_has_no_column(folder: Path):
    fields = {c: json.loads((folder / c / "manifest.json").read_text()) for c in SCORES}
    assert "column" not in fields["text"]
    assert fields["gain"]["column"] == "gain"
    assert Manifest.load(folder / "text").column == "text"


def test_a_finished_job_computes_nothing_and_a_missing_shard_alone_is_made_again(folder: Path):
    config = config_of(folder, "gain", "teacher.tokens_per_batch=256")
    job = teacher_job(config, load_corpus(config), ALONE)
    assert precompute(job).num_tokens == 0
    shard = next((folder / "gain").glob("shard-*"))
    content = shard.read_bytes()
    shard.unlink()
    assert precompute(job).num_tokens > 0
    assert shard.read_bytes() == content


def test_a_folder_of_another_column_is_refused(folder: Path):
    config = config_of(folder, "student", f"teacher.store={folder / 'text'}")
    job = teacher_job(config, load_corpus(config), ALONE)
    with pytest.raises(ValueError, match=r"text belongs to column text, this job has student"):
        precompute(job)


def test_an_image_that_is_gone_is_named_with_its_sample(folder: Path, tmp_path: Path):
    config = config_of(folder, "student", f"teacher.store={tmp_path / 'new'}")
    own = load_corpus(config)
    path = own.train_records[2].images[0]
    sample = own.train.encode(2)
    job = teacher_job(config, own, ALONE)
    assert job.score([sample]).shape == (len(sample.char_spans),)
    away = path.rename(tmp_path / "away.png")
    try:
        with pytest.raises(ValueError, match=r"image of sample \('mine', 2\) cannot be read"):
            job.score([sample])
    finally:
        away.rename(path)


@pytest.mark.parametrize("column", SCORES)
def test_a_run_reads_the_column_of_its_score_and_no_other(column: str, folder: Path, corpus):
    other = {"text": "gain", "student": "text", "gain": "student"}[column]
    config = config_of(folder, column)
    computed = open_computed(config, corpus, ALONE)
    computed.require(config.elision)
    problem = f"{other} holds the column {other}, this run's score reads {column}; run `regate"
    wrong = load_config(
        folder / "run.yaml",
        [f"teacher.column={column}", f"teacher.store={folder / other}", *SCORES[column]],
    )
    for refuse in (
        lambda: open_computed(wrong, corpus, ALONE),
        lambda: walk_plan(wrong, corpus),
        lambda: picture_sample(wrong, folder / "sample.png"),
        lambda: Computed(ReferenceStore(folder / other)).require(wrong.elision),
    ):
        with pytest.raises(ValueError, match=problem):
            refuse()
    # A run that reads no store may name any.
    Computed(ReferenceStore(folder / other)).require(RegateConfig(keep_share=1.0))


@pytest.mark.parametrize("score", [Gain(), ExcessLoss(reference="student")])
def test_an_online_teacher_gives_text_alone(score):
    online = OnlineReference(lambda _: torch.zeros(0), lambda _: [], teacher_id="small")
    Computed(online).require(RegateConfig(), online=True)
    with pytest.raises(ValueError, match=f"reads the column {score.column}, but an online teacher"):
        Computed(online).require(RegateConfig(score=score), online=True)


@pytest.mark.parametrize(
    ("knobs", "problem"),
    [
        ({"column": "student", "mode": "online"}, "mode='online': column=student is computed once"),
        ({"column": "gain", "sharding": "zero3"}, "sharding='zero3': column=gain runs the whole"),
        ({"column": "student", "path": Path("x")}, "path=.*: column=student reads no other model"),
    ],
)
def test_what_a_column_does_not_allow_is_refused(knobs, problem: str):
    with pytest.raises(ValueError, match=problem):
        TeacherConfig(**knobs)
    TeacherConfig(column="gain", path=Path("x"), tokenizer="own")


def test_reports_call_gains_gains(folder: Path):
    text = report.info(folder / "gain")
    assert "column        gain" in text
    assert "\ngains         mean" in text
    assert " -inf to -4" in text
    shares = [float(line[14:21].strip(" %")) for line in text.splitlines() if " to " in line]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    words = report.show(config_of(folder, "gain"), least=1)
    assert "most gain" in words
    assert "least gain" in words
    assert "hardest" not in words
