"""A data set that has grown: only the new samples are scored, and nothing old is lost."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.stores.reference.manifest import APPEND_NAME, shard_path
from regate_ds.stores.reference.reader import ReferenceStore
from regate_ds.teacher.precompute import TeacherJob, precompute
from tests.support.samples import make_samples
from tests.teacher.reference_job_helper import files_of, make_job

FEW, MORE = 20, 30


def job_of(store: Path, samples: list, **changes) -> TeacherJob:
    return make_job(store, index=AnswerIndex.build(samples), encode=samples.__getitem__, **changes)


def watched(job: TeacherJob, *, stop_after: int | None = None) -> tuple[TeacherJob, list]:
    """The job, and the keys of the samples that it scores."""
    seen: list = []

    def score(samples):
        if stop_after is not None and len(seen) >= stop_after:
            raise RuntimeError("power cut")
        seen.extend(sample.key for sample in samples)
        return job.score(samples)

    return replace(job, score=score), seen


@pytest.fixture
def few(tmp_path) -> Path:
    precompute(job_of(tmp_path / "store", make_samples(FEW)))
    return tmp_path / "store"


def test_only_new_samples_are_scored_and_old_shards_stay(few):
    before = {name: c for name, c in files_of(few).items() if name.startswith("shard")}
    samples = make_samples(MORE)
    old_N = ReferenceStore(few).read([sample.key for sample in samples[:FEW]])
    job, seen = watched(job_of(few, samples))
    precompute(job)
    assert sorted(seen) == [sample.key for sample in samples[FEW:]]
    after = files_of(few)
    assert {name: after[name] for name in before} == before
    store = ReferenceStore(few, verify="full")
    assert store.fingerprint == job.index.fingerprint
    assert torch.equal(store.read([sample.key for sample in samples[:FEW]]), old_N)
    alone_N = torch.cat([job_of(few, samples).score([s]) for s in samples[FEW:]])
    new_N = store.read([sample.key for sample in samples[FEW:]])
    torch.testing.assert_close(new_N, alone_N, rtol=2**-11, atol=1e-5)
    assert job.is_complete


def test_samples_may_be_put_before_and_between_the_old_ones(few):
    samples = make_samples(MORE)
    mixed = samples[FEW:25] + samples[:FEW][::-1] + samples[25:]
    old_N = ReferenceStore(few).read([sample.key for sample in samples[:FEW]])
    precompute(job_of(few, mixed))
    store = ReferenceStore(few, verify="full")
    assert torch.equal(store.read([sample.key for sample in samples[:FEW]]), old_N)
    # A shard that is lost is computed again from the same batches, though rows have moved.
    whole = files_of(few)
    shard_path(few, 3).unlink()
    precompute(job_of(few, mixed))
    assert files_of(few) == whole


def test_an_interrupted_addition_ends_with_the_files_of_one_that_was_not(few, tmp_path):
    samples = make_samples(MORE)
    other = tmp_path / "other"
    precompute(job_of(other, samples[:FEW]))
    precompute(job_of(other, samples))
    job, seen = watched(job_of(few, samples), stop_after=4)
    with pytest.raises(RuntimeError, match="power cut"):
        precompute(job)
    first = list(seen)
    job, seen = watched(job_of(few, samples))
    precompute(job)
    assert sorted(first + seen) == [sample.key for sample in samples[FEW:]]
    assert files_of(few) == files_of(other)


def test_until_the_new_samples_are_done_the_store_serves_the_old_data(few):
    samples = make_samples(MORE)
    with pytest.raises(RuntimeError, match="power cut"):
        precompute(watched(job_of(few, samples), stop_after=4)[0])
    assert (few / APPEND_NAME).exists()
    old = job_of(few, samples[:FEW])
    ReferenceStore(few, verify="full").require(old.index.fingerprint)
    # A job for the old data finds it complete, and leaves alone what was begun.
    assert precompute(old).num_tokens == 0
    job, seen = watched(job_of(few, samples))
    precompute(job)
    assert len(seen) < MORE - FEW


def test_a_second_addition_follows_the_first(few):
    precompute(job_of(few, make_samples(25)))
    job, seen = watched(job_of(few, make_samples(MORE)))
    precompute(job)
    assert len(seen) == 5
    assert ReferenceStore(few, verify="full").index == job.index


def test_the_new_samples_may_have_batches_of_another_size(few):
    precompute(job_of(few, make_samples(MORE), tokens_per_batch=30))
    assert job_of(few, make_samples(MORE)).is_complete


@pytest.mark.parametrize("change", ["a prompt", "a label", "one is gone"])
def test_an_old_sample_that_has_changed_refuses_the_addition_naming_both_and_it(few, change):
    own, samples = AnswerIndex.build(make_samples(FEW)).fingerprint, make_samples(MORE)
    old, message = samples[4], "sample 'set' record 14 has other tokens or labels in the answer"
    if change == "a prompt":
        samples[4] = replace(old, input_ids_S=old.input_ids_S.roll(1))
    if change == "a label":
        samples[4] = replace(old, labels_S=old.labels_S.clamp(max=7))
    if change == "one is gone":
        del samples[4]
        message = "sample 'set' record 14 is not in the answer index"
    job = job_of(few, samples)
    text = rf"fingerprint {own}, this job has {job.index.fingerprint}; samples may .*{message}"
    with pytest.raises(ValueError, match=text):
        precompute(job)


def test_a_store_that_is_not_finished_is_not_added_to(tmp_path):
    samples = make_samples(MORE)
    with pytest.raises(RuntimeError, match="power cut"):
        precompute(watched(job_of(tmp_path, samples[:FEW]), stop_after=4)[0])
    with pytest.raises(ValueError, match="finish it with the data that it was begun with, then"):
        precompute(job_of(tmp_path, samples))


def test_an_addition_that_was_begun_refuses_another_until_it_is_given_up(few):
    samples = make_samples(MORE)
    with pytest.raises(RuntimeError, match="power cut"):
        precompute(watched(job_of(few, samples), stop_after=4)[0])
    with pytest.raises(ValueError, match=rf"or delete {few / APPEND_NAME}"):
        precompute(job_of(few, samples[:25]))
    (few / APPEND_NAME).unlink()
    precompute(job_of(few, samples[:25]))
    assert ReferenceStore(few, verify="full").index.num_samples == 25
    assert not list(few.glob(".*")) + list(few.glob("append*"))


def test_another_teacher_does_not_add(few):
    with pytest.raises(ValueError, match="belongs to teacher small, this job has large"):
        precompute(job_of(few, make_samples(MORE), teacher_id="large"))
