"""What a job says of its speed."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from regate_ds.teacher.precompute import precompute
from regate_ds.teacher.throughput import (
    PLAIN_TOKENS,
    Throughput,
    measurable,
    measure_share,
    plain_forward,
)
from tests.support.models import causal_lm
from tests.support.samples import make_samples
from tests.teacher.plain_job_helper import make_plain_job, score


def test_a_share_is_of_the_seconds_of_the_same_batches():
    seen: list[tuple[str, object]] = []

    def run(name: str, seconds: float):
        def call(batch):
            seen.append((name, batch))
            time.sleep(seconds)

        return call

    share = measure_share([["a"], ["b"]], run("score", 0.05), run("plain", 0.02))
    assert share == pytest.approx(0.4, abs=0.15)
    # Each way warms up on a batch before it is timed.
    assert [name for name, _ in seen] == 4 * ["score", "plain"]
    assert measure_share([], run("score", 0), run("plain", 0)) is None


def test_only_what_a_plain_forward_pass_can_hold_is_measured():
    lengths = [700, 700, PLAIN_TOKENS + 1, 600]
    assert measurable([2, 0, 1, 3], lengths) == [3, 0]
    assert measurable([2], lengths) == []


def test_a_job_names_its_rate_and_its_share():
    text = str(Throughput(3000, 2.0, busy_share=0.9, score_share=1.1))
    assert text == "3000 tokens in 2.0 s (1500 tokens/s, 0.99 of plain forward speed)"
    assert str(Throughput(3000, 2.0, 0.9)) == "3000 tokens in 2.0 s (1500 tokens/s)"
    assert str(Throughput(0, 0.0)) == "nothing was left to compute"


def test_a_job_counts_the_tokens_of_this_start_and_the_time_of_its_teacher(tmp_path):
    calls = []

    def slow(samples):
        calls.append(len(samples))
        time.sleep(0.02)
        return score(samples)

    job = make_plain_job(tmp_path / "store", score=slow, plain=lambda _: time.sleep(0.02))
    num_batches = len(job.batches(np.arange(10)))
    done = precompute(job)
    assert done.num_tokens == int(job.index.num_positions.sum())
    assert 0.02 * num_batches <= done.seconds * done.busy_share <= done.seconds
    assert done.score_share == pytest.approx(1.0, abs=0.5)
    assert len(calls) == len(list(job.store.glob("shard-*"))) + 2 * 3


def test_the_plain_pass_has_the_logits_of_every_position():
    model, samples = causal_lm(), make_samples(3)
    heads = []
    model.lm_head.register_forward_hook(lambda _, __, logits: heads.append(logits.shape))
    assert plain_forward(model, samples, pad_id=1).shape == (3,)
    longest = max(sample.input_ids_S.numel() for sample in samples)
    assert heads == [torch.Size([3, longest, model.config.vocab_size])]
