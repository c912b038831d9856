"""`regate tokenizer`: the new student reads the same samples in fewer tokens, and trains."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml

from regate_ds.algorithm.batch import IGNORE
from regate_ds.cli import main
from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.corpus import load_corpus
from regate_ds.recipe.students.load import load_student
from regate_ds.recipe.students.student import save_student
from regate_ds.recipe.vocabulary.specialise import specialise
from tests.support.chat_corpus import make_chat_corpus
from tests.support.small_corpus import TEXT, VISION, make_corpus


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    make_corpus(folder, num_train=12, num_test=2)
    records = json.loads((folder / "data" / "train.json").read_text())
    for number, record in enumerate(records):
        record["source"] = ("web", "book")[number % 2]
    (folder / "data" / "train.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module", params=["own", "llava", "qwen2_5_vl"])
def pair(request, tmp_path_factory, own):
    """Two configurations: of a student, and of the one that reads by a tokenizer of its data."""
    if request.param == "own":
        folder, path = own, own / "run.yaml"
    else:
        folder = tmp_path_factory.mktemp("chat")
        path = make_chat_corpus(folder, request.param)
    counts = specialise(load_config(path), folder / "new", size=500, by=None)
    return load_config(path), load_config(path, [f"model.path={folder / 'new'}"]), counts


def test_the_same_samples_have_the_same_texts_and_images(pair):
    (old, new), counts = (load_corpus(config) for config in pair[:2]), pair[2]
    assert len(old.train) == len(new.train)
    lengths = [0, 0]
    for row in range(len(old.train)):
        before, after = old.train.encode(row), new.train.encode(row)
        assert said(after.input_ids_S, new) == said(before.input_ids_S, old)
        kept = [one.labels_S[one.labels_S != IGNORE] for one in (before, after)]
        assert said(kept[1], new) == said(kept[0], old)
        assert before.images == after.images
        for which, one in enumerate((before, after)):
            lengths[which] += int((~one.is_placeholder_S).sum())
    assert lengths == [counts["all"].old_tokens, counts["all"].new_tokens]
    assert counts["all"].samples == len(old.train)


def test_weights_keep_the_precision_in_which_they_are_stored(own, tmp_path):
    stored = load_student(own / "student", dtype=torch.bfloat16)
    save_student(stored, tmp_path / "half")
    config = load_config(own / "run.yaml", [f"model.path={tmp_path / 'half'}"])
    specialise(config, tmp_path / "new", size=300, by=None)
    new = load_student(tmp_path / "new", dtype=None)
    assert new.model.config.dtype == torch.bfloat16
    old_rows, rows = (one.model.get_input_embeddings().weight for one in (stored, new))
    token = sorted({*stored.tokenizer.get_vocab()} & {*new.tokenizer.get_vocab()})[0]
    before, after = (one.tokenizer.convert_tokens_to_ids(token) for one in (stored, new))
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows[after], old_rows[before])


def said(ids, corpus) -> str:
    return corpus.student.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)


def test_fewer_tokens_say_it(pair):
    count = pair[2]["all"]
    assert count.new_tokens < count.old_tokens
    assert count.new_labels < count.old_labels


def test_the_new_student_trains_and_another_vocabularys_store_is_refused(own, capsys):
    folder, config = own, str(own / "run.yaml")
    assert main(["teacher", config]) == 0
    given = ["--out", str(folder / "cli"), "--size", "600", "--by", "source"]
    assert main(["tokenizer", config, *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if re.match(r" *(all|source=\w+) ", line)]
    assert [row[:2] for row in rows] == [["all", "12"], ["source=web", "6"], ["source=book", "6"]]
    for column in (2, 3, 7, 8):
        assert int(rows[0][column]) == int(rows[1][column]) + int(rows[2][column])
    written = json.loads((folder / "cli" / "tokens.json").read_text())
    assert written["all"]["new_tokens"] == int(rows[0][2])

    new = [config, f"model.path={folder / 'cli'}", f"run.out={folder / 'run'}"]
    assert main(["train", *new, "run.steps=6"]) == 1
    assert "store" in capsys.readouterr().err
    store = f"teacher.store={folder / 'store2'}"
    assert main(["teacher", *new, store]) == 0
    assert main(["train", *new, store, "run.steps=6", "run.deepspeed=null"]) == 0


def test_several_ranks_are_refused(own, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="^this job has 2 ranks, and each would write the student"):
        specialise(load_config(own / "run.yaml"), tmp_path / "new", size=500, by=None)


def test_what_cannot_be_done_is_told_before_anything_is_read(own, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    config = load_config(own / "run.yaml")
    with pytest.raises(ValueError, match=r"--out .*full: is not empty; give another folder"):
        specialise(config, tmp_path / "full", size=500, by=None)
    tree = yaml.safe_load((own / "run.yaml").read_text())
    tree["model"] = {"tokenizer": str(own / "student"), "text": TEXT, "vision": VISION}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match="model.path=None: a fresh student has nothing to carry"):
        specialise(load_config(tmp_path / "run.yaml"), tmp_path / "new", size=500, by=None)
