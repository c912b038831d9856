"""`regate data check`: what it builds, what it reports, and its exit code."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from regate_ds import cli
from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.corpus import Corpus, load_corpus
from tests.support.small_corpus import make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, num_train=6, num_test=3)
    return folder


@pytest.fixture
def told(corpus: Path, tmp_path: Path) -> list[str]:
    """A configuration, whose data no other test changes."""
    shutil.copytree(corpus / "data", tmp_path / "data")
    paths = (f"data.{name}={tmp_path / 'data' / name}.json" for name in ("train", "test"))
    return [str(corpus / "run.yaml"), *paths]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "train.json"


def check(told: list[str], *more: str) -> int:
    return cli.main(["data", "check", *told, *more])


def corpus_of(told: list[str]) -> Corpus:
    return load_corpus(load_config(Path(told[0]), told[1:]), weights=False)


def test_the_index_is_built_once_and_its_figures_are_told(told, path, capsys):
    assert check(told) == 0
    first = capsys.readouterr()
    assert "encode mine: 100%" in first.err
    corpus = corpus_of(told)
    tokens = int(corpus.index.num_positions.sum())
    answers = corpus.index.num_tokens
    line = f"{path}: 6 records, 6 samples, {tokens} tokens, {answers} answer tokens, 6 images"
    assert line in first.out
    assert f"fingerprint {corpus.index.fingerprint}" in first.out
    assert "test.json: 3 records" in first.out
    assert check(told) == 0
    again = capsys.readouterr()
    assert (again.out, "encode" in again.err) == (first.out, False)


def test_bad_records_are_listed_and_stop_a_run_unless_they_are_left_out(told, path, capsys):
    records = json.loads(path.read_text())
    records[2]["image"] = "absent.png"
    path.write_text(json.dumps(records))
    assert check(told) == 1
    out = capsys.readouterr().out
    assert "6 records, 5 samples" in out
    bad = f"{path}, record 2 (id {records[2]['id']}): there is no image file"
    assert f"1 bad records:\n  {bad}" in out
    assert check(told, "data.skip_bad=true") == 0
    with pytest.raises(ValueError, match=r"record 2 .* leave such records out with data.skip_bad"):
        corpus_of(told)


def test_a_change_that_size_and_time_do_not_show_is_found_by_content(told, path, capsys):
    assert check(told, "--content") == 0
    before, records = path.stat(), json.loads(path.read_text())
    answer = json.dumps(records[4]["conversations"][1]["value"])
    other = json.dumps(json.loads(answer)[::-1])
    path.write_text(path.read_text().replace(answer, other, 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert check(told) == 0
    capsys.readouterr()
    assert check(told, "--content") == 1
    out = capsys.readouterr().out
    assert f"{path} has other bytes than when it was indexed" in out
    assert "has changed\n" in out
    assert f"or delete {path.parent / '.regate_cache'}" in out


def test_an_image_that_changed_its_size_is_found_by_content(told, path, capsys):
    assert check(told) == 0
    image = path.parent / json.loads(path.read_text())[3]["image"]
    with Image.open(image) as picture:
        larger = picture.resize((picture.width + 1, picture.height))
    larger.save(image)
    assert check(told, "--content") == 1
    assert f"{path}, record 3, has changed\n" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["data.cache", "run.out"])
def test_files_of_the_run_do_not_lie_among_the_data(told, tmp_path, capsys, key: str):
    folder = tmp_path / "rows"
    folder.mkdir()
    assert check([*told, f"data.train={folder}", f"{key}={folder / 'mine'}"]) != 0
    found = f"{key}={folder / 'mine'}: lies in {folder}, whose files are the data"
    assert found in capsys.readouterr().err
