"""Batches and shards follow from the data; who scores them, from the ranks."""

import torch

from regate_ds.stores.shares import share_out
from regate_ds.teacher.batching import by_length, cut_batches, cut_shards, padded_tokens


def plan_batches(lengths: torch.Tensor, tokens_per_batch: int) -> list[list[int]]:
    rows = by_length(torch.arange(len(lengths)), lengths)
    return cut_batches(rows, lengths, tokens_per_batch)


def test_batches_hold_every_row_once_within_the_budget():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        lengths = torch.randint(1, 60, (37,), generator=generator)
        batches = plan_batches(lengths, tokens_per_batch=50)
        assert sorted(row for batch in batches for row in batch) == list(range(37))
        for batch in batches:
            padded = len(batch) * int(lengths[batch].max())
            assert padded <= 50 or len(batch) == 1


def test_batches_go_from_long_to_short():
    lengths = torch.tensor([3, 9, 3, 5, 9])
    assert plan_batches(lengths, tokens_per_batch=10) == [[1], [4], [3, 0], [2]]


def test_few_batches_are_one_shard_each_and_many_are_cut_large():
    rows, ones = torch.arange(70), torch.ones(10_001, dtype=torch.int64)
    assert [s.tolist() for s in cut_shards(rows, ones, 1)] == [[i] for i in range(70)]
    many = cut_shards(torch.arange(10_001), ones, 1)
    assert {len(shard) for shard in many[:-1]} == {16}
    assert torch.equal(torch.cat(many), torch.arange(10_001))


def test_a_shard_alone_gives_its_batches_again():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (2000,), generator=generator)
    rows = torch.randperm(2000, generator=generator)[:1500].sort().values
    whole = cut_batches(by_length(rows, lengths), lengths, 60)
    shards = cut_shards(rows, lengths, 60)
    assert max(map(len, shards)) > 16
    assert [b for shard in shards for b in cut_batches(shard, lengths, 60)] == whole


def test_the_cost_of_a_batch_is_that_of_its_padded_rows():
    assert padded_tokens([[0, 2], [1]], torch.tensor([3, 9, 5])) == 2 * 5 + 9


def test_shares_are_whole_and_differ_by_no_more_than_one_cost():
    generator = torch.Generator().manual_seed(0)
    for num_parts in (1, 3, 8):
        costs = torch.randint(1, 100, (29,), generator=generator).tolist()
        parts = share_out(costs, num_parts)
        assert sorted(n for part in parts for n in part) == list(range(29))
        assert parts == [sorted(part) for part in parts]
        loads = [sum(costs[n] for n in part) for part in parts]
        assert max(loads) - min(loads) <= max(costs)


def test_a_share_without_work_is_empty():
    assert share_out([5], 3) == [[0], [], []]
