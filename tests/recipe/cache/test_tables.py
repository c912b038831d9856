"""A Parquet file or a folder is indexed, cached and read as the JSON file with the same records."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from regate_ds.recipe.cache.entry import DataSet, open_data
from tests.recipe.cache.cache_helper import BAD, GOOD, in_memory, source, write

datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")

RECORDS = [*GOOD, *BAD[:5]]
"""All that a table can hold: not half a character, nor a record that is no object."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "copies")
    datasets.disable_progress_bars()


def table(folder: Path, form: str) -> Path:
    """The records as a table, with an image field that is a list or null."""
    images = [record.get("image") for record in RECORDS]
    columns = {
        "id": [record["id"] for record in RECORDS],
        "image": [[name] if isinstance(name, str) else name for name in images],
        "conversations": [record["conversations"] for record in RECORDS],
    }
    data = datasets.Dataset.from_dict(columns)
    if form == "parquet":
        data.to_parquet(folder / "rows.parquet")
        return folder / "rows.parquet"
    (folder / "hub").mkdir()
    for split in ("train", "test"):
        data.to_parquet(folder / "hub" / f"{split}-00000-of-00001.parquet")
    return folder / "hub" / "train"


def what_it_holds(data: DataSet) -> Any:
    causes = [(bad.number, bad.id, bad.cause) for bad in data.bad]
    records = [(r.key, r.id, r.images, r.images_per_marker, r.turns) for r in data.records]
    return causes, records, data.image_sizes.tolist(), data.index.offsets.tolist()


@pytest.mark.parametrize("form", ["parquet", "hub"])
def test_a_table_is_indexed_as_the_json_file_with_its_records(tmp_path: Path, form: str):
    expected = open_data(source(write(tmp_path, RECORDS)), [tmp_path / "json"])
    path = table(tmp_path, form)
    found = open_data(source(path, image_root=tmp_path), [tmp_path / "cache"])
    assert what_it_holds(found) == what_it_holds(expected)
    assert found.index == expected.index
    assert len(found.bad) == 5
    records, _, _ = in_memory(expected.source)
    copied = pickle.loads(pickle.dumps(found.records))
    assert [record.turns for record in copied] == [record.turns for record in records]


def test_a_table_that_is_written_again_is_indexed_anew(tmp_path: Path):
    write(tmp_path, RECORDS)
    path = table(tmp_path, "hub")
    before = source(path, image_root=tmp_path).entry_name()
    assert source(path, image_root=tmp_path).entry_name() == before
    file = path.parent / "test-00000-of-00001.parquet"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))
    assert source(path, image_root=tmp_path).entry_name() != before


def test_the_number_of_frames_is_part_of_what_a_cache_is_of(tmp_path: Path):
    path = write(tmp_path, GOOD)
    one = source(path)
    more = type(one)(one.path, one.name, one.image_root, one.encoder, video_frames=8)
    assert one.entry_name() != more.entry_name()
    assert json.dumps(more.identity())
