"""When a cache is built, where, and what is refused of data that has changed since."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
from pathlib import Path

import pytest

from regate_ds.data.collate import SampleDataset
from regate_ds.recipe.cache import entry
from regate_ds.recipe.cache.entry import DataSet, open_data
from regate_ds.recipe.cache.source import Source
from tests.recipe.cache.cache_helper import GOOD, draw, source, whole, write


@pytest.fixture
def built(monkeypatch) -> list[Path]:
    """The folders that were built from here on."""
    folders: list[Path] = []
    real = entry.build

    def build(of: Source, folder: Path) -> None:
        folders.append(folder)
        real(of, folder)

    monkeypatch.setattr(entry, "build", build)
    return folders


def samples_of(data: DataSet) -> SampleDataset:
    return SampleDataset(data.records, data.source.encoder, data)


def test_a_second_start_builds_nothing(tmp_path, built):
    path, cache = write(tmp_path, GOOD), tmp_path / "cache"
    first = open_data(source(path), [cache])
    second = open_data(source(path), [cache])
    assert len(built) == 1
    assert [one.name for one in cache.iterdir()] == [first.folder.name]
    assert second.index == first.index


@pytest.mark.parametrize(
    "other",
    [
        {"rule": whole},
        {"shift": 1},
        {"max_length": 61},
        {"user": "V:"},
        {"name": "other"},
        {"image_root": "elsewhere"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_other_settings_are_indexed_by_themselves_and_the_first_stay(tmp_path, built, other):
    path, cache = write(tmp_path, GOOD), tmp_path / "cache"
    if "image_root" in other:
        other = {"image_root": tmp_path / "elsewhere"}
        other["image_root"].mkdir()
        write(other["image_root"], [])
    indexes = [open_data(source(path, **how), [cache]).index for how in ({}, other, {}, other)]
    assert len(built) == 2
    assert indexes[0] == indexes[2]
    assert indexes[1] == indexes[3]


def test_a_file_of_another_size_or_time_is_indexed_anew(tmp_path, built):
    path, cache = write(tmp_path, GOOD), tmp_path / "cache"
    before = open_data(source(path), [cache])
    write(tmp_path, GOOD[1:])
    after = open_data(source(path), [cache])
    assert (len(before.records), len(after.records)) == (len(GOOD), len(GOOD) - 1)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert open_data(source(path), [cache]).index == after.index
    assert len(built) == 3


def test_a_file_that_changes_while_it_is_indexed_leaves_nothing(tmp_path, monkeypatch):
    path, cache = write(tmp_path, GOOD), tmp_path / "cache"
    of, real = source(path), Source.parser

    def touch(self, **how):
        os.utime(path, ns=(0, 1))
        return real(self, **how)

    monkeypatch.setattr(Source, "parser", touch)
    with pytest.raises(ValueError, match=f"{path} has changed while it was indexed; start again"):
        open_data(of, [cache])
    assert not [one for one in cache.iterdir() if one.is_dir()]


def test_a_killed_build_leaves_nothing_that_looks_finished(tmp_path, built):
    path, cache = write(tmp_path, GOOD), tmp_path / "cache"
    child = os.fork()
    if child == 0:
        # The last file is there, but the folder has not been renamed.
        entry.sync_files = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        open_data(source(path), [cache])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (left,) = (one for one in cache.iterdir() if one.is_dir())
    assert (left / "manifest.json").is_file()
    found = open_data(source(path), [cache])
    assert len(built) == 1
    assert [one.name for one in cache.iterdir()] == [found.folder.name]


def open_at_once(path: Path, cache: Path) -> list[DataSet]:
    found: list[DataSet] = []
    threads = [
        threading.Thread(target=lambda: found.append(open_data(source(path), [cache])))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_of_those_that_start_together_one_builds_and_the_others_wait(tmp_path, built):
    path, cache = write(tmp_path, GOOD), tmp_path / "cache"
    found = open_at_once(path, cache)
    assert len(built) == 1
    assert len({data.index.to_bytes() for data in found}) == 1
    assert len(found) == 4


def test_without_locks_several_build_and_one_stays(tmp_path, built, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    gate, real = threading.Barrier(4), entry.build
    monkeypatch.setattr(entry, "build", lambda *told: (gate.wait(), real(*told)))
    path, cache = write(tmp_path, GOOD), tmp_path / "cache"
    found = open_at_once(path, cache)
    assert len(built) == len(found) == 4
    assert len({data.index.to_bytes() for data in found}) == 1
    assert [one.name for one in cache.iterdir()] == [found[0].folder.name]
    assert f"{cache} has no locks (No locks available)" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_said_and_the_next_one_is_taken(tmp_path, capsys):
    path = write(tmp_path, GOOD)
    (tmp_path / "beside").write_text("a file")
    folders = [tmp_path / "beside", tmp_path / "run" / "cache"]
    found = open_data(source(path), folders)
    assert found.folder.parent == folders[1]
    said = capsys.readouterr().out
    assert said.startswith(f"{folders[0]} cannot be written (")
    assert said.endswith(f"): {path} is indexed in {folders[1]}\n")
    with pytest.raises(ValueError, match="beside cannot be written .* set data.cache to a folder"):
        open_data(source(path), folders[:1])


def test_a_cache_that_is_there_is_read_without_being_able_to_write(tmp_path, built, monkeypatch):
    path, cache = write(tmp_path, GOOD), tmp_path / "cache"
    open_data(source(path), [cache])
    monkeypatch.setattr(entry, "_writable", None)
    assert len(open_data(source(path), [tmp_path / "none", cache]).records) == len(GOOD)


def test_a_cache_that_has_changed_in_any_byte_is_refused(tmp_path):
    path, cache = write(tmp_path, GOOD), tmp_path / "cache"
    folder = open_data(source(path), [cache]).folder
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        for place in range(0, len(content), max(1, len(content) // 20)):
            changed = bytearray(content)
            changed[place] ^= 4
            file.write_bytes(changed)
            try:
                read = open_data(source(path), [cache])
            except ValueError as error:
                assert str(error).endswith("; delete the folder"), (file.name, place)  # noqa: PT017
            else:
                # White space of JSON, or figures that no training reads.
                assert file.name == "manifest.json", place
                assert read.index.fingerprint
        file.write_bytes(content)


def test_an_image_that_has_changed_its_size_is_named_when_its_sample_is_read(tmp_path):
    data = open_data(source(write(tmp_path, GOOD)), [tmp_path / "cache"])
    image = draw(tmp_path / "b.png", 9)
    samples = samples_of(data)
    for row in (0, 1, 3, 4):
        assert samples[row].encoded.key == ("set", row)
    sizes = r"record 2, is 9 x 3 pixels, but was 7 x 3"
    named = rf"image file {image} of .*, {sizes} .* delete {data.folder}"
    for read in (samples.__getitem__, samples.encode):
        with pytest.raises(ValueError, match=named):
            read(2)


def test_an_image_that_has_gone_is_named_when_its_sample_is_read(tmp_path):
    data = open_data(source(write(tmp_path, GOOD)), [tmp_path / "cache"])
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match=r"record 2 .*there is no image file .*b\.png, but was"):
        samples_of(data)[2]


def test_an_image_that_has_broken_is_named_when_its_sample_is_read(tmp_path):
    data = open_data(source(write(tmp_path, GOOD)), [tmp_path / "cache"])
    (tmp_path / "b.png").write_bytes(b"no image")
    named = r"record 2 .*image file .*b\.png is broken .*, but was usable .* or delete"
    with pytest.raises(ValueError, match=named):
        samples_of(data)[2]


def test_a_text_that_has_changed_unseen_is_named_when_its_sample_is_read(tmp_path):
    path = write(tmp_path, GOOD)
    data, before = open_data(source(path), [tmp_path / "cache"]), path.stat()
    path.write_text(path.read_text().replace("a cat", "a dog"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = open_data(source(path), [tmp_path / "cache"])
    assert again.folder == data.folder
    with pytest.raises(ValueError, match="record 1, has other tokens or images than when"):
        samples_of(again)[1]
    assert samples_of(again)[2].encoded.key == ("set", 2)


def test_a_name_is_cut_by_its_bytes_and_may_hold_brackets(tmp_path, built):
    for name in ("x[1].jsonl", f"{'字' * 80}.jsonl"):
        path = tmp_path / name
        path.write_bytes(write(tmp_path, GOOD).read_bytes())
        open_data(source(path), [tmp_path / "cache"])
    assert len(built) == 2


def test_a_damaged_cache_is_named(tmp_path):
    path, cache = write(tmp_path, GOOD), tmp_path / "cache"
    folder = open_data(source(path), [cache]).folder
    (folder / "manifest.json").write_text("")
    with pytest.raises(ValueError, match=f"^{folder} is damaged .*; delete the folder"):
        open_data(source(path), [cache])


def test_data_that_changed_while_its_build_was_waited_for_is_not_stored_under_the_old_name(
    tmp_path,
):
    path, cache = write(tmp_path, GOOD), tmp_path / "cache"
    cache.mkdir()
    name = source(path).entry_name()
    write(tmp_path, GOOD[1:])
    with pytest.raises(ValueError, match="has changed while it was waited for; start again"):
        entry._build_into(source(path), cache, name)
    assert list(cache.iterdir()) == []
