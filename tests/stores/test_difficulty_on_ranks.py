"""Difficulty spread over data ranks equals difficulty kept by one."""

import random
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from regate_ds.algorithm.batch import IGNORE, SampleKey, TokenBatch
from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.stores.difficulty.indexed import DifficultyStore
from regate_ds.stores.difficulty.stream import StreamDifficulty
from tests.support.ranks import run_ranks
from tests.support.samples import make_index, make_samples
from tests.support.stores import read_difficulty, write_difficulty

pytestmark = pytest.mark.slow

NUM_SAMPLES = 11
NUM_STEPS = 12


@cache
def _index() -> AnswerIndex:
    return make_index(NUM_SAMPLES)


def _window(step: int, rank: int) -> tuple[list[SampleKey], torch.Tensor]:
    """What a rank writes in a step: some samples, also twice or none, and new values."""
    chosen = random.Random(100 * step + rank).choices(
        _index().keys, k=[0, 5, 1, 3][(step + rank) % 4]
    )
    generator = torch.Generator().manual_seed(100 * step + rank)
    return chosen, torch.rand(len(_index().locate(chosen)), generator=generator)


def _played_by_one(world_size: int, num_steps: int) -> torch.Tensor:
    """All values after these steps: one dict entry a sample, ranks and samples in order."""
    lengths = _index().num_labels.tolist()
    values = {key: torch.zeros(length) for key, length in zip(_index().keys, lengths)}
    for step in range(num_steps):
        for rank in range(world_size):
            keys, values_N = _window(step, rank)
            parts = values_N.split([len(values[key]) for key in keys])
            values.update(zip(keys, parts))
    return torch.cat(list(values.values()))


def _stream(group: dist.ProcessGroup | None) -> StreamDifficulty:
    """One that has heard of every sample."""
    samples = make_samples(NUM_SAMPLES)
    labels = [sample.labels_S for sample in samples]
    labels_BT = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE)
    keys = tuple((sample.key,) for sample in samples)
    store = StreamDifficulty(group)
    store.admit([TokenBatch(keys, torch.zeros_like(labels_BT), labels_BT)])
    return store


def _play(store: DifficultyStore | StreamDifficulty, rank: int, steps: range) -> None:
    for step in steps:
        write_difficulty(store, *_window(step, rank))


def check_ranks_read_what_any_rank_wrote(rank: int, world_size: int) -> None:
    store, stream = DifficultyStore(_index(), dist.group.WORLD), _stream(dist.group.WORLD)
    for step in range(NUM_STEPS):
        _play(store, rank, range(step, step + 1))
        _play(stream, rank, range(step, step + 1))
        expected = _played_by_one(world_size, step + 1)
        keys, _ = _window(step + 7, rank)
        assert torch.equal(read_difficulty(store, keys), expected[_index().locate(keys)])
        assert torch.equal(read_difficulty(stream, keys), expected[_index().locate(keys)])
    assert torch.equal(read_difficulty(store, _index().keys), _played_by_one(world_size, NUM_STEPS))


def check_the_last_rank_wins(rank: int) -> None:
    store = DifficultyStore(_index(), dist.group.WORLD)
    key = _index().keys[4]
    write_difficulty(store, [key], torch.full((len(_index().locate([key])),), float(rank)))
    assert bool((read_difficulty(store, [key]) == dist.get_world_size() - 1).all())


def check_a_rank_without_samples_takes_part(rank: int) -> None:
    store = DifficultyStore(_index(), dist.group.WORLD)
    keys = list(_index().keys) if rank == 1 else []
    assert read_difficulty(store, keys).shape == (len(_index().locate(keys)),)
    write_difficulty(store, keys, torch.ones(len(_index().locate(keys))))
    assert bool((read_difficulty(store, _index().keys) == 1).all())


def check_ranks_save(rank: int, folder: Path) -> None:
    store = DifficultyStore(_index(), dist.group.WORLD)
    _play(store, rank, range(5))
    store.save(folder)
    stream = _stream(dist.group.WORLD)
    _play(stream, rank, range(5))
    stream.save(folder)


def check_ranks_load(rank: int, folder: Path, saved_by: int) -> None:
    store = DifficultyStore(_index(), dist.group.WORLD)
    store.load(folder)
    assert torch.equal(read_difficulty(store, _index().keys), _played_by_one(saved_by, 5))
    stream = _stream(dist.group.WORLD)
    stream.load(folder)
    assert torch.equal(read_difficulty(stream, _index().keys), _played_by_one(saved_by, 5))


def check_resume_equals_never_having_stopped(rank: int, folder: Path) -> None:
    straight = DifficultyStore(_index(), dist.group.WORLD)
    _play(straight, rank, range(NUM_STEPS))
    resumed = DifficultyStore(_index(), dist.group.WORLD)
    _play(resumed, rank, range(5))
    resumed.save(folder)
    dist.barrier()
    resumed = DifficultyStore(_index(), dist.group.WORLD)
    resumed.load(folder)
    _play(resumed, rank, range(5, NUM_STEPS))
    assert torch.equal(
        read_difficulty(resumed, _index().keys), read_difficulty(straight, _index().keys)
    )


def check_sidecars_of_different_moments_are_refused(rank: int, folder: Path) -> None:
    store = DifficultyStore(_index(), dist.group.WORLD)
    store.save(folder)
    _play(store, rank, range(1))
    if rank == 1:
        store.save(folder)
    dist.barrier()
    with pytest.raises(ValueError, match="different moments.*0-of-2.npz': 0.*1-of-2.npz': 1"):
        store.load(folder)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_read_what_any_rank_wrote(world_size):
    run_ranks(check_ranks_read_what_any_rank_wrote, world_size, world_size)


def test_the_last_rank_wins():
    run_ranks(check_the_last_rank_wins, 3)


def test_a_rank_without_samples_takes_part():
    run_ranks(check_a_rank_without_samples_takes_part, 2)


def test_resume_equals_never_having_stopped(tmp_path):
    run_ranks(check_resume_equals_never_having_stopped, 2, tmp_path)


def test_sidecars_of_different_moments_are_refused(tmp_path):
    run_ranks(check_sidecars_of_different_moments_are_refused, 2, tmp_path)


def test_any_number_of_ranks_reads_what_three_saved(tmp_path):
    run_ranks(check_ranks_save, 3, tmp_path)
    run_ranks(check_ranks_load, 2, tmp_path, 3)
    alone = DifficultyStore(_index())
    alone.load(tmp_path)
    assert torch.equal(read_difficulty(alone, _index().keys), _played_by_one(3, 5))
