"""Rows of Parquet files and data set folders are the records that a JSON file has."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from regate_ds.data.llava import tables
from regate_ds.data.llava.formats.sources import Sources
from regate_ds.data.llava.images import load_rgb
from regate_ds.data.llava.parse import Parser
from regate_ds.data.llava.raw import require_data
from regate_ds.data.llava.records import Record
from regate_ds.data.llava.tables import TableRecords, find_rows, is_table

datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: Any):
    """Copies that `datasets` makes of a Parquet file go into the test's own folder."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    datasets.disable_progress_bars()
    yield
    datasets.config.HF_DATASETS_CACHE = before


def said(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def draw(folder: Path) -> list[Path]:
    paths = [folder / f"{n}.png" for n in range(3)]
    for path in paths:
        Image.effect_noise((6, 4), 50).convert("RGB").save(path)
    return paths


def rows(paths: list[Path]) -> dict[str, list[Any]]:
    """Three records: LLaVA's form, with one image, two and none."""
    named = [[str(paths[0])], [str(paths[1]), str(paths[2])], []]
    asked = [said("<image> q", "a"), said("<image> or <image>", "b"), said("r", "c")]
    return {"id": ["x", "y", "z"], "images": named, "conversations": asked}


def typed(paths: list[Path]) -> Any:
    """The same in OpenAI's form, with the images themselves between the texts."""
    first, second, third = (Image.open(path) for path in paths)
    contents = [[first, " q"], [second, " or ", third], ["r"]]
    messages = []
    for content, answer in zip(contents, "abc"):
        parts = [
            {"type": "text", "text": part} if isinstance(part, str)
            else {"type": "image", "image": part}
            for part in content
        ]  # fmt: skip
        parts = [{"text": None, "image": None, **part} for part in parts]
        answers = [{"type": "text", "text": answer, "image": None}]
        messages.append(
            [{"role": "user", "content": parts}, {"role": "assistant", "content": answers}]
        )
    text = datasets.Value("string")
    part = {"type": text, "text": text, "image": datasets.Image()}
    turn = {"role": text, "content": datasets.List(part)}
    features = datasets.Features({"id": text, "messages": datasets.List(turn)})
    return datasets.Dataset.from_dict({"id": ["x", "y", "z"], "messages": messages}, features)


def records(path: Path, folder: Path) -> list[Record]:
    raw = pickle.loads(pickle.dumps(TableRecords(path, find_rows(path))))
    parser = Parser(folder / "data.json", "set", Sources(folder), verify_images=True)
    return [parser.record(number, raw[number]) for number in range(len(raw))]


def from_json(folder: Path) -> list[Record]:
    """The oracle: the same rows through a JSON text."""
    columns = rows(draw(folder))
    raws = [dict(zip(columns, row)) for row in zip(*columns.values())]
    parser = Parser(folder / "data.json", "set", Sources(folder), verify_images=True)
    return [parser.record(n, raw) for n, raw in enumerate(json.loads(json.dumps(raws)))]


def require_same(found: list[Record], expected: list[Record]) -> None:
    """Compare the records, and their images by their pixels."""
    assert [replace(r, images=()) for r in found] == [replace(r, images=()) for r in expected]
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one.images, other.images, strict=True):
            assert not ImageChops.difference(load_rgb(a), load_rgb(b)).getbbox()


def write(data: Any, folder: Path, form: str) -> Path:
    """Write a data set in a form; return the path that `data.train` would have."""
    if form == "parquet":
        data.to_parquet(folder / "rows.parquet")
        return folder / "rows.parquet"
    out = folder / "out"
    if form == "disk":
        data.save_to_disk(out)
    elif form == "splits on disk":
        datasets.DatasetDict(train=data, test=data).save_to_disk(out)
        return out / "train"
    else:
        (out / "data").mkdir(parents=True)
        data.to_parquet(out / "data" / "train-00000-of-00001.parquet")
    if form == "hub, two splits":
        data.to_parquet(out / "data" / "test-00000-of-00001.parquet")
        return out / "test"
    return out


@pytest.mark.parametrize("form", ["parquet", "disk", "splits on disk", "hub", "hub, two splits"])
@pytest.mark.parametrize("kind", ["LLaVA", "typed"])
def test_rows_are_the_records_of_a_json_file(tmp_path: Path, form: str, kind: str):
    expected = from_json(tmp_path)
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    data = datasets.Dataset.from_dict(rows(paths)) if kind == "LLaVA" else typed(paths)
    path = write(data, tmp_path, form)
    assert is_table(path)
    found = records(path, tmp_path)
    if kind == "LLaVA":
        assert found == expected
    require_same(found, expected)


def test_a_folder_of_images_with_their_turns_is_read(tmp_path: Path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    path = draw(folder)[0]
    line = {"file_name": "0.png", "conversations": said("<image>", "a")}
    (folder / "metadata.jsonl").write_text(json.dumps(line))
    for other in ("1.png", "2.png"):
        (folder / other).unlink()
    [record] = records(folder, tmp_path)
    assert record.images == (path,)


def test_some_rows_of_a_table_are_read_by_their_places(tmp_path: Path):
    path = write(datasets.Dataset.from_dict({"id": ["x", "y", "z"]}), tmp_path, "parquet")
    places = find_rows(path)
    assert places.tolist() == [[0, 1], [1, 2], [2, 3]]
    some = TableRecords(path, places[1:])
    assert [len(some), some[0], some[1]] == [2, {"id": "y"}, {"id": "z"}]


def test_a_path_that_is_no_table_is_left_to_the_other_readers(tmp_path: Path):
    (tmp_path / "data.json").write_text("[]")
    for name in ("data.json", "gone.json", "gone.jsonl", "gone"):
        assert not is_table(tmp_path / name)


def refused(path: Path) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        find_rows(path)
    return str(error.value)


def test_what_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"there is no data file .*gone.parquet; give a JSON, J"):
        require_data(tmp_path / "gone.parquet")
    assert refused(tmp_path / "gone.parquet") == (
        f"there is no data file {tmp_path / 'gone.parquet'}; give a JSON, JSONL or Parquet file"
    )
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    line = f"{tmp_path / 'bad.parquet'} cannot be read by Hugging Face's datasets ("
    assert refused(tmp_path / "bad.parquet").startswith(line)
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty").startswith(f"{tmp_path / 'empty'} cannot be read by")


@pytest.mark.parametrize("form", ["splits on disk", "hub, two splits"])
def test_a_folder_of_several_splits_needs_the_name_of_one(tmp_path: Path, form: str):
    folder = write(datasets.Dataset.from_dict({"id": ["x"]}), tmp_path, form).parent
    line = f"{folder} has the splits train, test; name one of {folder / 'train'}, {folder / 'test'}"
    assert refused(folder) == line
    assert form == "splits on disk" or refused(folder / "dev") == line


def test_without_datasets_the_way_to_get_it_is_said(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    assert refused(tmp_path) == (
        f"{tmp_path} is read by Hugging Face's datasets, which is not installed; run "
        "`pip install datasets`, or give a JSON or JSONL file"
    )
