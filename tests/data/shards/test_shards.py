"""The samples of shards are the records that a JSON file has, whatever the shards are cut into."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import webdataset

from regate_ds.data.llava.formats.sources import Sources
from regate_ds.data.llava.parse import Parser
from regate_ds.data.llava.raw import data_files, find_places, image_root_of, open_raw, require_data
from regate_ds.data.llava.records import Cause, Record
from regate_ds.data.shards.folder import data_shards, is_shards, read_index
from regate_ds.data.shards.mds import read_mds_sample
from regate_ds.data.shards.records import ShardRecords, find_samples
from regate_ds.data.shards.tar import samples_in_tar
from tests.data.shards.shards_helper import (
    picture,
    records_of,
    rows,
    samples,
    talk,
    told,
    write_mds,
    write_tars,
)


def wanted(number_of: list[list[bytes]]) -> list[Record]:
    """The records with these images, of a JSON file."""
    parser = Parser(Path("x.json"), "set", Sources(Path()), verify_images=True)
    return [
        parser.record(n, {"conversations": talk(n, len(images)), "images": images})
        for n, images in enumerate(number_of)
    ]


def images_of(sample: dict[str, bytes]) -> list[bytes]:
    return [content for field, content in sample.items() if field not in ("json", "__key__")]


@pytest.mark.parametrize("size", [1, 3, 9])
@pytest.mark.parametrize("long", ["", "a/" * 70])
def test_samples_of_tar_files_are_the_records(tmp_path: Path, size: int, long: str):
    made = samples()
    paths = write_tars(tmp_path, made, size, long)
    (tmp_path / "._shard-000.tar").write_bytes(b"a Mac's shadow")
    expected = told(wanted([images_of(sample) for sample in made]))
    assert told(records_of(tmp_path)) == expected
    assert told(records_of(tmp_path / f"shard-{{000..{len(paths) - 1:03d}}}.tar")) == expected
    assert told(records_of(paths[0])) == expected[:size]
    assert records_of(tmp_path)[1].id == "id1"
    assert data_shards(tmp_path) == paths


def test_webdatasets_own_writer_and_reader_agree(tmp_path: Path):
    made = samples()
    with webdataset.ShardWriter(str(tmp_path / "own-%02d.tar"), maxcount=2, verbose=0) as writer:
        for sample in made:
            writer.write({**sample, "__key__": sample["__key__"].decode()})
    shards = sorted(map(str, tmp_path.glob("*.tar")))
    read = [images_of(each) for each in bare(webdataset.WebDataset(shards, shardshuffle=False))]
    assert told(records_of(tmp_path)) == told(wanted(read))
    assert len(read) == len(made)


def bare(found: Any) -> list[dict[str, bytes]]:
    return [{k: v for k, v in one.items() if not k.startswith("__")} for one in found]


@pytest.mark.parametrize("size", [1, 3, 9])
def test_samples_of_mosaicmls_shards_are_the_records(tmp_path: Path, size: int):
    write_mds(tmp_path, rows(), size)
    assert told(records_of(tmp_path)) == told(wanted([row["images"] for row in rows()]))
    raw = pickle.loads(pickle.dumps(ShardRecords(tmp_path, find_samples(tmp_path))))
    assert [raw[n]["id"] for n in range(5)] == [f"é{n}" for n in range(5)]
    assert [raw[n]["number"] for n in range(5)] == list(range(5))


def test_energons_folder_has_splits_and_leaves_samples_out(tmp_path: Path):
    write_tars(tmp_path, samples(), 2)
    (tmp_path / ".nv-meta").mkdir()
    splits = tmp_path / ".nv-meta" / "split.yaml"
    parts = "split_parts: {train: ['shard-{000..002}.tar'], val: [shard-003.tar], test: []}"
    splits.write_text(f"{parts}\nexclude: [shard-001.tar, shard-002.tar/0004]\n")
    assert [record.id for record in records_of(tmp_path / "train")] == ["0000", "id1", "id5"]
    assert [record.id for record in records_of(tmp_path / "val")] == ["id6"]
    assert data_files(tmp_path / "val") == [splits, tmp_path / "shard-003.tar"]
    assert image_root_of(tmp_path / "val") == tmp_path
    (tmp_path / "part").mkdir()
    (tmp_path / "shard-000.tar").rename(tmp_path / "part" / "shard-000.tar")
    splits.write_text(
        "split_parts: {train: [part/shard-000.tar, shard-001.tar], val: [shard-003.tar]}\n"
        "exclude: [part/shard-000.tar/0000, shard-000.tar/0001]\n"
    )
    named = [record.id for record in records_of(tmp_path / "train")]
    assert named == ["id1", "id2", "id3"]
    for path in (tmp_path, tmp_path / "dev"):
        with pytest.raises(ValueError, match=r"has the splits train, val; name one of .*/train"):
            require_data(path)


def test_other_paths_are_no_shards(tmp_path: Path):
    (tmp_path / "index.json").write_text("[]")
    assert not any(is_shards(tmp_path / name) for name in (".", "index.json", "absent", "x.json"))


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"json": b"{"}, r"0001.json is not JSON"),
        ({"json": None, "txt": b"a"}, r"0001 has no .json, but txt; its record belongs there"),
        ({"txt": b"a"}, r"0001 has .txt, which is not read; leave it out"),
        ({"mp4": b"a"}, r"0001 has .mp4, which is not read"),
        (
            {"json": json.dumps({"images": ["a.png"]}).encode(), "png": b"a"},
            r"0001 has .png, which its record does not name",
        ),
    ],
)
def test_a_sample_that_cannot_be_read_is_a_bad_record(tmp_path: Path, changes: Any, cause: str):
    made = samples(3)
    made[1] = {k: v for k, v in {**made[1], **changes}.items() if v is not None}
    write_tars(tmp_path, made)
    raw = open_raw(tmp_path, find_places(tmp_path))
    found = raw[1]
    assert isinstance(found, Cause)
    assert str(found).startswith(cause) or cause in str(found)
    assert isinstance(raw[2], dict)


def test_files_beside_the_shards_may_be_named(tmp_path: Path):
    made = samples(2)
    record = {"conversations": talk(1, 1), "image": "beside.png"}
    made[1] = {"__key__": b"1", "json": json.dumps(record).encode()}
    write_tars(tmp_path, made)
    raw = open_raw(tmp_path, find_places(tmp_path))
    assert raw[1] == {"id": "1", **record, "image": ["beside.png"]}


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: (folder / "a.tar").write_bytes(b"no tar"), "cannot be read as a tar file"),
        (
            lambda folder: (folder / "a.tar").write_bytes(b""),
            "cannot be read as a tar file|without",
        ),
        (lambda folder: spoiled(folder), r"a.tar has more behind byte \d+, where its members end"),
        (lambda folder: spoiled(folder, keep=100), "a.tar has more behind byte"),
        (lambda folder: twice(folder), "several tar files behind one another; write it again"),
        (lambda folder: cut(folder), "shard.00001.mds is not whole; fetch it again"),
        (lambda folder: cut(folder, keep=0), "shard.00001.mds is not whole"),
        (lambda folder: cut(folder, keep=2), "shard.00001.mds is not whole"),
        (lambda folder: cut(folder, keep=9), "shard.00001.mds is not whole"),
        (
            lambda folder: (folder / "index.json").write_text('{"shards": [{}]}'),
            "index.json is no index of MDSWriter .*format",
        ),
        (
            lambda folder: (folder / "index.json").write_text('{"shards"'),
            "index.json is no index of MDSWriter .*write it again",
        ),
        (lambda folder: forget(folder), "names the shard .*shard.00001.mds, which is not there"),
        (
            lambda folder: compressed(folder),
            "compression='zstd', which are not read; write them by",
        ),
    ],
)
def test_shards_that_cannot_be_read_are_named(tmp_path: Path, write: Any, message: str):
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        find_places(tmp_path)


def spoiled(folder: Path, keep: int | None = None) -> None:
    """Write a tar file with a bit of its second sample's first header changed, or cut off there."""
    (path,) = write_tars(folder, samples(2))
    path = path.rename(folder / "a.tar")
    start = list(samples_in_tar(path))[1][1]
    content = bytearray(path.read_bytes())
    content[start + 1] ^= 1
    path.write_bytes(content if keep is None else content[: start + keep])


def twice(folder: Path) -> None:
    (path,) = write_tars(folder, samples(2))
    path.write_bytes(2 * path.read_bytes())


def cut(folder: Path, keep: int = -3) -> None:
    write_mds(folder, rows())
    path = folder / "shard.00001.mds"
    path.write_bytes(path.read_bytes()[:keep])


def forget(folder: Path) -> None:
    write_mds(folder, rows())
    (folder / "shard.00001.mds").unlink()


def compressed(folder: Path) -> None:
    write_mds(folder, rows())
    about = json.loads((folder / "index.json").read_text())
    about["shards"][0]["compression"] = "zstd"
    (folder / "index.json").write_text(json.dumps(about))


def test_a_column_that_cannot_be_read_is_named(tmp_path: Path):
    write_mds(tmp_path, rows())
    path = tmp_path / "index.json"
    path.write_text(path.read_text().replace('"int"', '"pkl"'))
    found = open_raw(tmp_path, find_places(tmp_path))[0]
    assert isinstance(found, Cause)
    assert "column 'number' has the encoding 'pkl', which is not read; use str" in str(found)


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        (b'"answer 0"', b'"answer 0 ', "column 'conversations' is no json (Unterminated string"),
        ("é0".encode(), b"\xff\xff0", "column 'id' is no str ('utf-8' codec can't decode"),
    ],
)
def test_a_column_that_is_damaged_makes_a_bad_record(
    tmp_path: Path, old: bytes, new: bytes, cause: str
):
    write_mds(tmp_path, rows())
    path = tmp_path / "shard.00000.mds"
    assert path.read_bytes().count(old) == 1
    path.write_bytes(path.read_bytes().replace(old, new))
    raw = open_raw(tmp_path, find_places(tmp_path))
    found = raw[0]
    assert isinstance(found, Cause)
    assert str(found).startswith(cause)
    assert isinstance(raw[1], dict)


def test_columns_that_do_not_fill_their_sample_make_a_bad_record(tmp_path: Path):
    write_mds(tmp_path, rows())
    about = read_index(tmp_path)["shard.00000.mds"]
    for content in (b"", b"\1\0\0", bytes(12), bytes(21)):
        found = read_mds_sample(content, about)
        assert str(found) == f"has {len(content)} bytes, where its columns have 20"


def test_numbered_images_stand_in_the_order_of_their_numbers(tmp_path: Path):
    """webdataset's writer sorts fields by their names, so that 10 comes before 2."""
    fields = {f"{number}.png": picture(4 + number) for number in range(12)}
    talked = json.dumps({"conversations": talk(0, 12)}).encode()
    with webdataset.ShardWriter(str(tmp_path / "%02d.tar"), verbose=0) as writer:
        writer.write({"__key__": "a", "json": talked, **fields})
    assert told(records_of(tmp_path)) == told(wanted([list(fields.values())]))


def test_a_member_that_stands_twice_makes_a_bad_record(tmp_path: Path):
    (path,) = write_tars(tmp_path, samples(1))
    start, end = find_samples(path)[0].tolist()
    content = path.read_bytes()
    path.write_bytes(content[start:end] + content[start:])
    found = open_raw(path, find_places(path))[0]
    assert isinstance(found, Cause)
    assert str(found) == "0000 has .json twice; give each member a name of its own"


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")
def test_a_member_with_holes_ends_where_the_file_has_it(tmp_path: Path):
    for name in ("0.json", "1.json"):
        (tmp_path / name).write_text(json.dumps(talk(int(name[0]))))
    with (tmp_path / "0.png").open("wb") as file:
        file.truncate(1 << 20)
    words = ["tar", "-S", "--format=gnu", "-cf", "s.tar", "0.json", "0.png", "1.json"]
    subprocess.run(words, cwd=tmp_path, check=True)
    path = tmp_path / "s.tar"
    assert path.stat().st_size < 1 << 20
    raw = open_raw(path, find_places(path))
    assert [record["conversations"] for record in (raw[0], raw[1])] == [talk(0), talk(1)]
    assert len(raw[0]["images"][0]["bytes"]) == 1 << 20
