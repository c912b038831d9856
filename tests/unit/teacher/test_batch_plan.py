"""Batches and shards follow from the data; who scores them, from the ranks."""

import torch

from regate_ds.teacher.batch_plan import padded_tokens, plan_batches, plan_shards, share_out


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
    batches = plan_batches(lengths, tokens_per_batch=10)
    assert batches == [[1], [4], [3, 0], [2]]


def test_few_batches_are_one_shard_each_and_many_are_cut_large():
    assert plan_shards([[i] for i in range(70)]) == [[[i]] for i in range(70)]
    many = plan_shards([[i] for i in range(10_001)])
    assert {len(shard) for shard in many[:-1]} == {16}
    assert [row for shard in many for batch in shard for row in batch] == list(range(10_001))


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
