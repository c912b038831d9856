"""`regate rank`, and a run that reads what it wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from regate_ds.cli import main
from regate_ds.families.pictures import pictures_of
from regate_ds.recipe.config.tree import RunConfig, load_config
from regate_ds.recipe.corpus import load_corpus
from regate_ds.recipe.students.load import load_student
from regate_ds.recipe.students.qwen2_vl import build_qwen2_vl
from regate_ds.recipe.students.student import save_student
from regate_ds.stores.image_orders.reader import ImageOrderStore
from tests.recipe.rank_helper import RUNS, overrides
from tests.support.paths import ROOT
from tests.support.small_corpus import make_corpus
from tests.support.tiny_students import MROPE, QWEN_VISION, TEXT


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus in which two records show one image file, with two students, ranked and trained."""
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, num_train=10, num_test=1)
    data = folder / "data" / "train.json"
    records = json.loads(data.read_text())
    records[7]["image"] = records[2]["image"]
    data.write_text(json.dumps(records))
    tokenizer = load_student(folder / "student").tokenizer
    text = {**TEXT, "rope_parameters": MROPE, "max_position_embeddings": 512}
    vision = {**QWEN_VISION, "max_pixels": 48 * 48}
    save_student(build_qwen2_vl(tokenizer, text=text, vision=vision, seed=0), folder / "qwen")
    command = [sys.executable, "-m", "tests.recipe.rank_helper", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout)
    return folder


def config_of(folder: Path, student: str, *more: str) -> RunConfig:
    path, *rest = overrides(folder, student)
    return load_config(Path(path), [*rest, *more])


@pytest.mark.parametrize("student", RUNS)
def test_each_file_is_run_once_and_each_image_has_its_order(folder, student):
    config = config_of(folder, student)
    ranking, corpus = config.elision.stored_ranking, load_corpus(config)
    store = ImageOrderStore(config.rank.store, verify="full")
    store.require(corpus.index.fingerprint)
    assert (store.ranking, store.num_pictures, store.num_images) == (RUNS[student][1], 9, 10)
    assert ranking is not None
    for record in corpus.train_records:
        with Image.open(record.images[0]) as image:
            size = corpus.student.vision.num_tokens(image.size)
            inputs = corpus.student.vision.pixels([image.convert("RGB")])
        (picture,) = pictures_of(corpus.student.model, inputs, [size], ranking.reads)
        (found,) = store.read([(record.key, 0)], [size])
        assert sorted(found.tolist()) == list(range(size))
        half = -(-size // 2)
        assert torch.equal(found[:half], ranking.order(picture, half))


@pytest.mark.parametrize("student", RUNS)
def test_a_run_keeps_its_share_of_image_tokens_and_names_whose_orders_it_read(folder, student):
    config = config_of(folder, student)
    lines = (config.run.out / "metrics.jsonl").read_text().splitlines()
    dense, *sparse = [json.loads(line) for line in lines]
    assert dense["image_kept"] == dense["image_total"]
    for row in sparse:
        assert 0.25 <= row["image_kept"] / row["image_total"] < 0.3
    summary = json.loads((config.run.out / "summary.json").read_text())
    store = ImageOrderStore(config.rank.store)
    assert summary["orders_ranking"] == RUNS[student][1]
    assert summary["orders_model_id"] == store.model_id
    assert summary["data_fingerprint"] == store.fingerprint


def test_the_command_says_its_cost_and_the_run_whose_orders_it_reads(folder):
    said = (folder / "said.txt").read_text()
    assert "rank: 9 images in " in said
    assert "orders/student is complete with 10 images, which show 9 files, ranking atten" in said
    assert "image orders diversity by qwen2_vl-" in said


@pytest.mark.parametrize(
    ("command", "override", "message"),
    [
        ("rank", "elision.images.ranking=random", "images.ranking=RandomOrder needs no store, so"),
        ("rank", "rank.store=null", "rank.store=None: elision.images.ranking reads orders"),
        ("train", "rank.store=null", "rank.store=None: elision.images.ranking reads orders"),
        ("rank", "rank.batch=0", "rank.batch=0: must be at least 1"),
    ],
)
def test_a_wrong_setting_ends_in_one_line(folder, command, override, message, capsys):
    assert main([command, *overrides(folder, "student"), override]) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
