"""The power fails at every step in which the job writes: what is started again ends alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from regate_ds.stores.reference.reader import ReferenceStore
from regate_ds.teacher.precompute import TeacherJob, precompute
from tests.support.power import Disk, PowerFailure, copy_of
from tests.teacher.plain_job_helper import make_plain_job, score
from tests.teacher.reference_job_helper import files_of

FEW, MORE = 5, 8

NEW, ADDED = "a new store", "samples added to one"


def job_in(root: Path, changes: str, **more) -> TeacherJob:
    return make_plain_job(root / "stores" / "one", FEW if changes == NEW else MORE, **more)


@pytest.fixture(params=[NEW, ADDED])
def changes(request) -> str:
    return request.param


@pytest.fixture
def root(tmp_path, changes) -> Path:
    (tmp_path / "disk").mkdir()
    if changes == ADDED:
        precompute(job_in(tmp_path / "disk", NEW))
    return tmp_path / "disk"


def test_a_start_after_a_power_failure_at_any_step_ends_with_the_same_files(
    root, changes, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        whole = Disk(copy_of(root, tmp_path / "whole"), patch)
        precompute(job_in(whole.root, changes))
    expected, num_losses = files_of(whole.root / "stores" / "one"), 0
    assert whole.num_steps >= 20
    for step in range(whole.num_steps):
        before = copy_of(root, tmp_path / f"{step}")
        with monkeypatch.context() as patch:
            disk = Disk(before, patch, fail_at=step)
            with pytest.raises(PowerFailure):
                precompute(job_in(before, changes))
        for keeps_names in (False, True):
            place = tmp_path / f"{step} {keeps_names}"
            left = disk.after_power_failure(place, keeps_names=keeps_names)
            num_losses += _require_same_end(left, changes, expected)
    assert num_losses > 0


def _require_same_end(left: Path, changes: str, expected: dict[str, bytes]) -> int:
    """Start again; return how many shards had to be computed."""
    store = left / "stores" / "one"
    if changes == ADDED:
        ReferenceStore(store, verify="full")
    there = len(list(store.glob("shard-*")))
    scored: list[int] = []

    def counting(samples):
        scored.append(len(samples))
        return score(samples)

    precompute(job_in(left, changes, score=counting))
    assert files_of(store) == expected
    # Few batches are a shard each: what was there by name is not computed again.
    assert len(scored) == len(list(store.glob("shard-*"))) - there
    return len(scored)


def test_the_disk_of_these_tests_does_lose_what_was_not_synced(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr("regate_ds.stores.atomic_file._sync", lambda path: None)
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path / "disk", patch)
        precompute(job_in(disk.root, NEW))
    left = disk.after_power_failure(tmp_path / "left", keeps_names=False)
    assert not (left / "stores").exists()
