"""The job that ranks pictures: what it computes, what it skips, what it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regate_ds.algorithm.rankings.diversity import DiversityOrder
from regate_ds.algorithm.rankings.ranking import Picture
from regate_ds.ranking.job import rank_pictures
from regate_ds.stores.atomic_file import TEMPORARY_SUFFIX
from regate_ds.stores.image_orders.reader import ImageOrderStore
from tests.ranking.job_helper import (
    UNITS,
    Counting,
    check_ranks,
    files_of,
    make_job,
    read,
    units_of,
)
from tests.support.paths import ROOT
from tests.support.power import Disk, PowerFailure, copy_of
from tests.support.ranks import run_ranks


@pytest.fixture
def uninterrupted(tmp_path) -> Path:
    store = tmp_path / "uninterrupted"
    rank_pictures(make_job(store))
    return store


def test_the_store_holds_each_images_own_order(uninterrupted):
    store = ImageOrderStore(uninterrupted, verify="full")
    for unit, pictures in enumerate(UNITS):
        for values, shown in zip(read(unit)["values"], pictures, strict=True):
            size = shown.num_tokens
            picture = Picture(features_nF=values[:size])
            first = DiversityOrder().order(picture, -(-size // 2)).tolist()
            expected = first + [token for token in range(size) if token not in first]
            for image in shown.images:
                assert store.read([image], [size])[0].tolist() == expected
    num_pictures = sum(map(len, UNITS))
    assert (store.num_pictures, store.num_images) == (num_pictures, num_pictures + 4)


def test_each_picture_is_run_once_in_batches_of_the_size_asked_for(tmp_path):
    counting = Counting()
    cost = rank_pictures(make_job(tmp_path / "store", look=counting))
    assert counting.num_pictures == cost.num_pictures == sum(map(len, UNITS))
    assert counting.num_pictures / 4 <= counting.num_batches < counting.num_pictures / 2
    assert f"{cost.num_pictures} images in " in str(cost)


def test_a_second_job_finds_the_work_done(uninterrupted):
    before, counting = files_of(uninterrupted), Counting()
    cost = rank_pictures(make_job(uninterrupted, look=counting, batch=3))
    assert (counting.num_batches, str(cost)) == (0, "nothing was left to compute")
    assert files_of(uninterrupted) == before


def test_a_job_that_failed_goes_on_where_it_stopped(uninterrupted, tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        rank_pictures(make_job(tmp_path / "store", look=Counting(fail_after=3)))
    counting = Counting()
    rank_pictures(make_job(tmp_path / "store", look=counting))
    # Few batches are a shard each.
    assert counting.num_batches == len(list(uninterrupted.glob("shard-*"))) - 3
    assert files_of(tmp_path / "store") == files_of(uninterrupted)


def test_a_killed_job_ends_with_the_files_of_an_uninterrupted_one(uninterrupted, tmp_path):
    store = tmp_path / "store"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.ranking.job_helper", str(store)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, cwd=ROOT
    ) as killed:
        assert killed.stdout is not None
        for _ in range(4):
            assert killed.stdout.readline() == b"batch\n"
        killed.send_signal(signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    # A kill in the middle of a write leaves such a file behind.
    (store / f".shard-00004.u16.0123{TEMPORARY_SUFFIX}").write_bytes(b"half")
    finished = {name for name in files_of(store) if name.startswith("shard")}
    assert 0 < len(finished) < len(files_of(uninterrupted)) - 2
    rank_pictures(make_job(store))
    assert files_of(store) == files_of(uninterrupted)


def test_two_ranks_write_the_same_files(uninterrupted, tmp_path):
    run_ranks(check_ranks, 2, str(tmp_path))
    assert files_of(tmp_path / "many") == files_of(uninterrupted)


def test_a_start_after_a_power_failure_at_any_step_ends_with_the_same_files(
    uninterrupted, tmp_path, monkeypatch
):
    def job_in(root: Path):
        return make_job(root / "stores" / "one", units=units_of(UNITS[:3]))

    def fail(place: Path, at: int | None) -> Disk:
        place.mkdir()
        with monkeypatch.context() as patch:
            disk = Disk(place, patch, fail_at=at)
            if at is None:
                rank_pictures(job_in(place))
            else:
                with pytest.raises(PowerFailure):
                    rank_pictures(job_in(place))
        return disk

    whole = fail(tmp_path / "whole", None)
    expected = files_of(whole.root / "stores" / "one")
    for step in range(whole.num_steps):
        disk = fail(tmp_path / f"{step}", step)
        for keeps_names in (False, True):
            left = disk.after_power_failure(
                tmp_path / f"{step} {keeps_names}", keeps_names=keeps_names
            )
            again = copy_of(left, tmp_path / f"{step} {keeps_names} again")
            rank_pictures(job_in(again))
            assert files_of(again / "stores" / "one") == expected


def test_a_damaged_shard_is_reported_not_replaced(uninterrupted):
    path = uninterrupted / "shard-00001.u16"
    path.write_bytes(b"\0" * path.stat().st_size)
    (uninterrupted / "shard-00000.u16").unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.u16 is damaged"):
        rank_pictures(make_job(uninterrupted))


def test_a_store_of_another_model_is_refused(uninterrupted):
    with pytest.raises(ValueError, match="belongs to the model tower-1, this job has tower-2"):
        rank_pictures(make_job(uninterrupted, model_id="tower-2"))


def test_a_unit_with_more_pictures_than_a_batch_is_a_batch_of_its_own(tmp_path):
    counting = Counting()
    rank_pictures(make_job(tmp_path / "store", look=counting, batch=1))
    assert counting.num_batches == len(UNITS)


def test_data_without_an_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the data has no image, so there is nothing to rank"):
        make_job(tmp_path / "store", units=units_of([]))


def test_more_tokens_than_uint16_counts_are_refused_naming_the_image(tmp_path):
    (shown,) = UNITS[0]
    large = [[type(shown)(65536, shown.images)]]
    with pytest.raises(ValueError, match="image 0 of sample 'set' record 0 has 65536 tokens"):
        rank_pictures(make_job(tmp_path / "store", units=units_of(large)))
    assert not (tmp_path / "store").exists()


def test_a_ranking_that_gives_no_order_is_named_with_the_image(tmp_path):
    class Broken(DiversityOrder):
        def order(self, picture: Picture, num_first: int) -> torch.Tensor:
            return super().order(picture, num_first) * 0

    with pytest.raises(ValueError, match=r"^image \d of sample 'set' record \d+: the ranking gave"):
        rank_pictures(make_job(tmp_path / "store", ranking=Broken()))


def test_pictures_that_cannot_be_joined_are_refused_by_their_shapes(tmp_path):
    def read_tiles(unit: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.zeros(1, 2 + unit % 2, 3)}

    job = replace(make_job(tmp_path / "store", batch=3), read=read_tiles)
    with pytest.raises(ValueError, match=r"have the shapes .*2, 3.*3, 3.* set rank.batch=1"):
        job.read_units([0, 1])
    assert job.read_units([0, 2])["pixel_values"].shape == (2, 2, 3)
