"""What a micro-batch says of its positions, against a plain walk."""

from __future__ import annotations

import random

import pytest
import torch

from regate_ds.algorithm.batch import ABSENT, ALWAYS, ELIDABLE, IGNORE, TokenBatch, shift_labels
from tests.algorithm.plain_plan_helper import samples_of, wild_batch

KEYS = ((("set", 0),),)


def test_every_position_is_padding_or_stays_or_may_be_elided():
    rng = random.Random(0)
    for _ in range(30):
        batch = wild_batch(rng)
        kind = torch.full_like(batch.labels_BT, ABSENT)
        for sample in samples_of(batch):
            kind[sample.row, sample.positions] = ALWAYS
            kind[sample.row, sample.elidable] = ELIDABLE
        assert torch.equal(batch.kind_BT, kind)


def test_samples_are_counted_through_the_rows_and_labels_by_sample():
    rng = random.Random(1)
    for _ in range(30):
        batch = wild_batch(rng)
        expected = torch.full_like(batch.labels_BT, -1)
        counts = []
        for number, sample in enumerate(samples_of(batch)):
            expected[sample.row, sample.positions] = number
            labels = batch.labels_BT[sample.row, sample.positions]
            counts.append(int((labels != IGNORE).sum()))
        assert torch.equal(batch.sample_BT, expected)
        assert batch.num_labels_per_sample == counts
        assert len(batch.flat_keys) == len(counts)


def test_values_of_labels_are_spread_in_reading_order():
    labels = torch.tensor([[IGNORE, 3, IGNORE], [4, IGNORE, 5]])
    batch = TokenBatch(((("a", 0),), (("a", 1),)), torch.zeros_like(labels), labels)
    spread = batch.at_labels(torch.tensor([1.0, 2.0, 3.0]), empty=-1.0)
    assert spread.tolist() == [[-1.0, 1.0, -1.0], [2.0, -1.0, 3.0]]


def test_shifted_labels_are_the_next_positions_token_and_the_last_has_none():
    labels = torch.tensor([[IGNORE, 4, 5, IGNORE, 6]])
    assert shift_labels(labels).tolist() == [[4, 5, IGNORE, 6, IGNORE]]


def test_an_image_mask_of_another_shape_is_refused():
    labels = torch.tensor([[IGNORE, 3]])
    with pytest.raises(ValueError, match=r"image_BT \(1, 3\) and labels \(1, 2\) differ in shape"):
        TokenBatch(KEYS, torch.zeros_like(labels), labels, torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("keys", "segment", "labels", "message"),
    [
        (KEYS, [[0, 0]], [[1, 2, 3]], "give both the same shape"),
        (KEYS, [0, 0], [1, 2], "give both the same shape"),
        (KEYS * 2, [[0, 0]], [[1, 2]], "2 rows of keys for 1 rows"),
        (KEYS, [[0, 1]], [[1, 2]], "exactly one key for each of its segments"),
        (KEYS, [[0, -1]], [[1, 2]], "a padding position has a label"),
    ],
)
def test_a_batch_that_contradicts_itself_is_refused(keys, segment, labels, message: str):
    with pytest.raises(ValueError, match=message):
        TokenBatch(keys, torch.tensor(segment), torch.tensor(labels))
