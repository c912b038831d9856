"""A teacher that scores while training: the numbers of the store, and what it refuses."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from regate_ds.algorithm.batch import TokenBatch, number_runs
from regate_ds.data.collate import Batch, Collator, LoadedSample
from regate_ds.data.llava.sample import EncodedSample
from regate_ds.stores.reference.reader import ReferenceStore
from regate_ds.teacher.api import Teacher
from regate_ds.teacher.online import OnlineReference, WindowScorer, samples_of
from regate_ds.teacher.precompute import precompute
from regate_ds.teacher.scoring import score_samples
from tests.support.models import causal_lm
from tests.support.samples import make_index, make_samples
from tests.teacher.reference_job_helper import make_job

PAD, IMAGE = 1, 60


def loaded(number: int) -> LoadedSample:
    s = make_samples(12)[number]
    return LoadedSample(
        EncodedSample(s.key, s.input_ids_S, s.labels_S, number_runs(s.is_placeholder_S), (), ()), ()
    )


def batch_of(numbers: list[int], pack_length: int | None = None) -> Batch:
    collate = Collator(pad_id=0, vision=None, pack_length=pack_length)
    return collate([loaded(number) for number in numbers])


def teacher(**changes) -> Teacher:
    return Teacher(**{"model": causal_lm(), "pad_id": PAD, "image_token_id": IMAGE, **changes})


@pytest.mark.parametrize("pack_length", [None, 50])
def test_a_micro_batchs_samples_are_those_that_it_was_made_of(pack_length: int | None):
    numbers = [3, 0, 7, 5, 1]
    batch = batch_of(numbers, pack_length)
    found = {sample.key: sample for sample in samples_of(batch, [IMAGE])}
    assert list(found) == batch.tokens.flat_keys
    assert len(batch.tokens.keys) < len(numbers) or pack_length is None
    for number in numbers:
        sample = make_samples(12)[number]
        for name in ("input_ids_S", "labels_S", "is_placeholder_S"):
            assert torch.equal(getattr(found[sample.key], name), getattr(sample, name))


@pytest.mark.parametrize("tokens_per_batch", [1, 60, 10_000])
def test_losses_are_those_of_samples_scored_alone_whatever_the_batches(tokens_per_batch: int):
    model, samples = causal_lm().eval(), make_samples(9)
    score = partial(score_samples, model, pad_id=PAD)
    found_N = WindowScorer(score=score, tokens_per_batch=tokens_per_batch)(samples)
    expected_N = torch.cat([score([sample]) for sample in samples])
    # Before rounding to fp16: sums over other lengths in a batch.
    torch.testing.assert_close(found_N, expected_N, rtol=1e-5, atol=1e-5)


def test_a_window_reads_as_from_the_store(tmp_path):
    job = make_job(tmp_path / "store")
    precompute(job)
    store = ReferenceStore(job.store)
    online = teacher(tokens_per_batch=48).online()
    window = [batch_of([3, 0]), batch_of([7, 5, 1])]
    online.prepare(window)
    for batch in window:
        keys = batch.tokens.flat_keys
        torch.testing.assert_close(online.read(keys), store.read(keys), rtol=1e-3, atol=1e-3)
    assert online.seconds > 0


def test_values_are_rounded_as_in_a_store():
    online = teacher().online()
    online.prepare([batch_of([4])])
    found_N = online.read(batch_of([4]).tokens.flat_keys)
    assert torch.equal(found_N, found_N.half().float())


def test_a_teacher_is_named_as_in_the_store():
    assert teacher().online().teacher_id.startswith("llama-")


def test_only_the_window_that_was_prepared_last_can_be_read():
    online = teacher().online()
    online.prepare([batch_of([4])])
    online.prepare([batch_of([5])])
    online.read([("set", 15)])
    with pytest.raises(RuntimeError, match="no losses of sample 'set' record 14 are there"):
        online.read([("set", 14)])
    online.forget()
    with pytest.raises(RuntimeError, match="no losses of sample 'set' record 15 are there"):
        online.read([("set", 15)])


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_a_loss_that_no_store_would_hold_names_its_sample(value: float):
    def score(samples):
        losses = [score_samples(causal_lm().eval(), [s], pad_id=PAD) for s in samples]
        bad = [s.key[1] == 15 for s in samples]
        return torch.cat([x + value if b else x for x, b in zip(losses, bad)])

    online = OnlineReference(
        score, partial(samples_of, placeholder_ids=[IMAGE]), teacher_id="small"
    )
    online.prepare([batch_of([4, 5])])
    online.read([("set", 14)])
    with pytest.raises(ValueError, match="loss of sample 'set' record 15 is not finite, or beyond"):
        online.read([("set", 15)])


def test_a_teacher_that_would_learn_with_the_student_is_refused():
    model = causal_lm()
    online = teacher(model=model).online()
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight is the student's own"):
        online.require_frozen(model)
    online.require_frozen(causal_lm())
    online.require_frozen(model.requires_grad_(False))


def test_a_teacher_without_an_index_says_who_can_do_without():
    online = teacher().online()
    assert online.is_stream
    with pytest.raises(ValueError, match="knows no data beforehand, which only `attach`"):
        _ = online.index
    index = make_index(3)
    assert teacher().online(index).index is index


def test_padding_without_a_mask_is_read_as_the_student_reads_it():
    batch = batch_of([3, 0])
    tokens = batch.tokens
    unmasked = TokenBatch(tokens.keys, torch.zeros_like(tokens.segment_BT), tokens.labels_BT)
    online = teacher().online()
    online.prepare([batch])
    masked_N = online.read(tokens.flat_keys)
    online.prepare([Batch(batch.inputs, unmasked)])
    # Causal: what comes after an answer does not change its losses.
    torch.testing.assert_close(online.read(tokens.flat_keys), masked_N, rtol=1e-3, atol=1e-3)
