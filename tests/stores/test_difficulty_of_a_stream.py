"""Difficulty by key, without an index: against the store that has one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.stores.difficulty.indexed import DifficultyStore
from regate_ds.stores.difficulty.stream import StreamDifficulty
from tests.support.models import random_batch
from tests.support.stores import index_of, read_difficulty, write_difficulty

BATCHES = [
    TokenBatch(tuple(((f"micro{n}", i),) for i in range(2)), batch.segment_BT, batch.labels_BT)
    for n in range(4)
    for batch in [random_batch([[18], [9 + n]], seed=n)[1]]
]


def keys_of(window: list[TokenBatch]) -> list:
    return [key for batch in window for key in batch.flat_keys]


def play(store, steps: range) -> list[torch.Tensor]:
    """Read and write windows of some batches; what was read."""
    found = []
    for step in steps:
        window = random.Random(step).choices(BATCHES, k=2)
        store.admit(window)
        found.append(read_difficulty(store, keys_of(window)))
        generator = torch.Generator().manual_seed(step)
        write_difficulty(store, keys_of(window), torch.rand(len(found[-1]), generator=generator))
    return found


def test_it_remembers_what_the_indexed_store_remembers():
    found = play(StreamDifficulty(), range(12))
    expected = play(DifficultyStore(index_of(BATCHES)), range(12))
    assert len(found) == 12
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert any(bool(x.any()) for x in found)


def test_a_sample_with_other_answers_begins_anew():
    store, batch = StreamDifficulty(), BATCHES[0]
    store.admit([batch])
    write_difficulty(store, batch.flat_keys, torch.ones(int(batch.is_label_BT.sum())))
    labels_BT = batch.labels_BT.clone()
    row, position = batch.is_label_BT.nonzero()[0].tolist()
    labels_BT[row, position] += 1
    changed = TokenBatch(batch.keys, batch.segment_BT, labels_BT)
    store.admit([changed])
    one, other = read_difficulty(store, changed.flat_keys).split(changed.num_labels_per_sample)
    assert not one.any()
    assert bool((other == 1).all())


def test_one_key_for_two_samples_of_a_step_is_refused():
    batch = BATCHES[0]
    labels_BT = batch.labels_BT.clone()
    labels_BT[batch.is_label_BT] += 1
    other = TokenBatch(batch.keys, batch.segment_BT, labels_BT)
    with pytest.raises(ValueError, match="'micro0' record 0 comes twice in one step with differ"):
        StreamDifficulty().admit([batch, other])
    StreamDifficulty().admit([batch, batch])


def test_what_was_saved_goes_on_as_if_never_stopped(tmp_path: Path):
    whole, begun, resumed = StreamDifficulty(), StreamDifficulty(), StreamDifficulty()
    expected = play(whole, range(8))
    play(begun, range(5))
    begun.save(tmp_path)
    resumed.load(tmp_path)
    assert resumed.num_writes == 5
    for mine, theirs in zip(play(resumed, range(5, 8)), expected[5:], strict=True):
        assert torch.equal(mine, theirs)


def test_files_of_the_indexed_store_are_not_taken_for_its_own(tmp_path: Path):
    DifficultyStore(index_of(BATCHES)).save(tmp_path)
    with pytest.raises(ValueError, match=r"lacks stream-difficulty-\*-of-\*\.npz"):
        StreamDifficulty().load(tmp_path)
