"""The job that computes a store: what it computes, what it skips, what it refuses."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regate_ds.stores.atomic_file import TEMPORARY_SUFFIX
from regate_ds.stores.reference.manifest import shard_path
from regate_ds.stores.reference.reader import ReferenceStore
from regate_ds.teacher.precompute import precompute
from regate_ds.teacher.scoring import score_samples
from tests.support.models import causal_lm
from tests.support.paths import ROOT
from tests.support.samples import make_samples
from tests.teacher.reference_job_helper import NUM_SAMPLES, files_of, make_job


@pytest.fixture
def uninterrupted(tmp_path) -> Path:
    store = tmp_path / "uninterrupted"
    precompute(make_job(store))
    return store


class Counting:
    """A scoring callable that counts its batches and fails after a number of them."""

    def __init__(self, job, fail_after: int | None = None) -> None:
        self.num_batches = 0
        self._score, self._fail_after = job.score, fail_after

    def __call__(self, samples):
        if self.num_batches == self._fail_after:
            raise RuntimeError("power cut")
        self.num_batches += 1
        return self._score(samples)


def test_the_store_holds_each_samples_own_losses(uninterrupted):
    store, teacher = ReferenceStore(uninterrupted), causal_lm().eval()
    for sample in make_samples(NUM_SAMPLES):
        alone_N = score_samples(teacher, [sample], pad_id=1)
        # fp16 in the store, and sums over other lengths in the batch.
        torch.testing.assert_close(store.read([sample.key]), alone_N, rtol=2**-11, atol=1e-5)


def test_a_second_job_finds_the_work_done(uninterrupted):
    before = files_of(uninterrupted)
    score = Counting(make_job(uninterrupted))
    done = precompute(make_job(uninterrupted, score=score))
    assert (score.num_batches, done.num_tokens) == (0, 0)
    assert files_of(uninterrupted) == before


def test_a_job_that_failed_goes_on_where_it_stopped(uninterrupted, tmp_path):
    job = make_job(tmp_path / "store")
    with pytest.raises(RuntimeError, match="power cut"):
        precompute(replace(job, score=Counting(job, fail_after=4)))
    score = Counting(job)
    precompute(replace(job, score=score))
    # Few batches are a shard each.
    assert score.num_batches == len(list(uninterrupted.glob("shard-*"))) - 4
    assert files_of(job.store) == files_of(uninterrupted)


def test_a_killed_job_ends_with_the_files_of_an_uninterrupted_one(uninterrupted, tmp_path):
    store = tmp_path / "store"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.teacher.reference_job_helper", str(store)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, cwd=ROOT
    ) as killed:
        assert killed.stdout is not None
        for _ in range(4):
            assert killed.stdout.readline() == b"batch\n"
        killed.send_signal(signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    # A kill in the middle of a write leaves such a file behind.
    (store / f".shard-00009.fp16.0123{TEMPORARY_SUFFIX}").write_bytes(b"half")
    finished = {name for name in files_of(store) if name.startswith("shard")}
    assert 0 < len(finished) < len(files_of(uninterrupted)) - 2
    precompute(make_job(store))
    assert files_of(store) == files_of(uninterrupted)


@pytest.mark.parametrize("name", ["shard-00002.fp16", "index-*.npz"])
def test_a_deleted_file_is_computed_again(uninterrupted, name):
    before = files_of(uninterrupted)
    next(uninterrupted.glob(name)).unlink()
    precompute(make_job(uninterrupted))
    assert files_of(uninterrupted) == before


def test_shards_without_a_manifest_are_refused_naming_the_folder(uninterrupted):
    (uninterrupted / "manifest.json").unlink()
    with pytest.raises(ValueError, match=rf"{uninterrupted} holds shards but no manifest\.json"):
        precompute(make_job(uninterrupted))


def test_a_shard_that_was_computed_again_with_other_digits_is_the_stores(uninterrupted):
    shard_path(uninterrupted, 1).unlink()
    job = make_job(uninterrupted)
    elsewhere = replace(job, score=lambda samples: job.score(samples) + 0.5)
    with pytest.raises(RuntimeError, match="power cut"):
        precompute(replace(job, score=Counting(job, fail_after=0)))
    precompute(elsewhere)
    assert ReferenceStore(uninterrupted).index == job.index
    assert job.is_complete


def test_a_damaged_shard_is_reported_not_replaced(uninterrupted):
    path = shard_path(uninterrupted, 1)
    path.write_bytes(b"\0" * path.stat().st_size)
    shard_path(uninterrupted, 0).unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.fp16 is damaged"):
        precompute(make_job(uninterrupted))


@pytest.mark.parametrize("name", ["manifest.json", "index-*.npz", "rows-*.npy", "shard-00002*"])
def test_a_flipped_byte_in_any_file_of_a_finished_store_is_reported(uninterrupted, name):
    path = next(uninterrupted.glob(name))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} is damaged"):
        precompute(make_job(uninterrupted))


def test_a_store_of_another_teacher_is_refused(uninterrupted):
    with pytest.raises(ValueError, match="belongs to teacher small, this job has large"):
        precompute(make_job(uninterrupted, teacher_id="large"))


def test_an_unfinished_store_with_other_batches_is_refused(tmp_path):
    job = make_job(tmp_path / "store")
    with pytest.raises(RuntimeError, match="power cut"):
        precompute(replace(job, score=Counting(job, fail_after=2)))
    with pytest.raises(ValueError, match="tokens_per_batch=48, this job has 30; use the"):
        precompute(replace(job, tokens_per_batch=30))


def test_a_finished_store_is_done_whatever_the_batches(uninterrupted):
    precompute(make_job(uninterrupted, tokens_per_batch=30))


def test_samples_in_another_order_than_the_index_are_refused(tmp_path):
    samples = make_samples(NUM_SAMPLES)[::-1]
    with pytest.raises(ValueError, match=r"row \d+ of the answer index is sample \('set', \d+\)"):
        precompute(make_job(tmp_path / "store", encode=samples.__getitem__))


def test_a_sample_that_has_changed_since_the_index_was_built_is_refused(tmp_path):
    samples = make_samples(NUM_SAMPLES)
    samples[4] = replace(samples[4], input_ids_S=samples[4].input_ids_S.roll(1))
    with pytest.raises(ValueError, match=r"'set', 14\), the data gives \('set', 14\) with other"):
        precompute(make_job(tmp_path / "store", encode=samples.__getitem__))


def test_a_loss_that_is_not_finite_names_its_sample(tmp_path):
    job = make_job(tmp_path / "store")

    def broken(samples):
        parts = [job.score([sample]) for sample in samples]
        bad = [sample.key == ("set", 20) for sample in samples]
        return torch.cat([part * float("nan") if b else part for part, b in zip(parts, bad)])

    with pytest.raises(ValueError, match="'set' record 20 is nan nats"):
        precompute(replace(job, score=broken))


def test_the_bar_shows_the_rate_and_the_end(tmp_path, capsys):
    done = precompute(make_job(tmp_path / "store"))
    last = capsys.readouterr().err.split("\r")[-1]
    assert "teacher: 100%" in last
    assert "token/s, ends " in last
    num_tokens = sum(sample.input_ids_S.numel() for sample in make_samples(NUM_SAMPLES))
    assert done.num_tokens == num_tokens
