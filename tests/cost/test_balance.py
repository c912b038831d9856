"""Samples are divided by cost: the same steps on any number of ranks, and little waiting."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace

import pytest

from regate_ds.cost.balance import divide, imbalance, micro_batches_needed
from regate_ds.cost.pipeline import makespan, smooth_order
from regate_ds.cost.sampler import BalancedBatches, BalancedSampler
from regate_ds.recipe.order import Order

RANKS = 64


def drawn(num: int, variation: float, seed: int) -> list[float]:
    """Costs above 0 with a mean of 1 and this coefficient of variation."""
    shape, rng = 1 / variation**2, random.Random(seed)
    return [rng.gammavariate(shape, 1 / shape) for _ in range(num)]


def in_order(num: int, num_ranks: int) -> list[list[list[int]]]:
    each = num // num_ranks
    return [[list(range(rank * each, (rank + 1) * each))] for rank in range(num_ranks)]


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("per_rank", [8, 16])
def test_64_ranks_wait_a_twentieth_at_most_where_a_plain_sampler_waits_a_fifth(per_rank, equal):
    plain, ours = [], []
    for seed in range(5):
        costs = drawn(RANKS * per_rank, 0.5, seed)
        plain.append(imbalance(costs, in_order(len(costs), RANKS)))
        ours.append(imbalance(costs, divide(costs, RANKS, per_rank // 4, equal=equal)))
    assert statistics.mean(plain) > 1.2
    assert max(ours) < 1.05


def test_each_sample_comes_once_and_every_rank_has_equally_many_micro_batches():
    costs = drawn(100, 0.8, 0)
    division = divide(costs, 7, 3)
    assert all(len(rank) == 3 and all(rank) for rank in division)
    assert sorted(n for rank in division for micro in rank for n in micro) == list(range(100))
    equal = divide(drawn(84, 0.8, 0), 7, 3, equal=True)
    assert {len(micro) for rank in equal for micro in rank} == {4}


def test_a_rank_with_one_huge_sample_still_has_all_its_micro_batches():
    division = divide([1000.0, *[1.0] * 7], 2, 3)
    assert all(len(rank) == 3 and all(rank) for rank in division)
    assert [0] in [micro for rank in division for micro in rank]


def test_no_micro_batch_is_larger_than_the_budget_padding_included():
    tokens = [int(300 * cost) + 10 for cost in drawn(256, 0.5, 1)]
    num_micro = micro_batches_needed(tokens, 8, tokens, 2048)
    division = divide(tokens, 8, num_micro, tokens=tokens, max_tokens=2048)
    sizes = [len(m) * max(tokens[n] for n in m) for rank in division for m in rank]
    assert max(sizes) <= 2048
    assert {len(rank) for rank in division} == {num_micro}
    with pytest.raises(ValueError, match="do not fit in"):
        divide(tokens, 8, num_micro - 1, tokens=tokens, max_tokens=2048)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: divide([1.0] * 5, 2, 3), "5 samples are fewer than 2 ranks with 3"),
        (lambda: divide([1.0] * 7, 2, 1, equal=True), "7 samples cannot be divided equally"),
        (lambda: micro_batches_needed([1.0], 1, [9], 8), "max_tokens=8: a sample has 9 tokens"),
        (lambda: micro_batches_needed([1.0] * 2, 2, [8, 8], 7), "a sample has 8 tokens"),
        (lambda: BalancedBatches([1.0], batch_size=2, rank=0, world_size=1), "needs tokens"),
        (lambda: batches([1.0] * 3, batch_size=4), "batch_size=4: 3 samples do not fill it"),
    ],
)
def test_what_cannot_be_divided_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def batches(costs, *, world_size: int = 1, rank: int = 0, batch_size: int = 32, **more):
    sizes = {"rank": rank, "world_size": world_size, "batch_size": batch_size}
    return BalancedBatches(costs, **sizes, **({"micro_batches": 2} | more))


def test_the_steps_are_the_same_on_any_number_of_ranks_and_whatever_samples_cost():
    dense, sparse = drawn(100, 0.5, 0), drawn(100, 0.9, 1)

    def steps(costs, world_size):
        ranks = [
            list(batches(costs, world_size=world_size, rank=r, epochs=2).steps())
            for r in range(world_size)
        ]
        return [sorted(n for rank in step for m in rank for n in m) for step in zip(*ranks)]

    found = steps(dense, 1)
    assert len(found) == 6
    assert (
        found
        == steps(dense, 4)
        == steps(sparse, 8)
        == steps(lambda step: (dense, sparse)[step % 2], 4)
    )
    epoch = [n for step in found[:3] for n in step]
    assert len(set(epoch)) == 96


def test_a_host_that_deals_micro_batches_out_in_turn_gives_each_rank_its_own():
    costs, sizes = drawn(70, 0.5, 0), {"batch_size": 32, "world_size": 4, "micro_batches": 2}
    sampler = BalancedSampler(costs, **sizes)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        numbers = list(sampler)
        assert len(set(numbers)) == len(sampler) == 64
        dealt = [numbers[i : i + 4] for i in range(0, 64, 4)]
        for rank in range(4):
            own = batches(costs, world_size=4, rank=rank, equal=True, epochs=2)
            own.step = 2 * epoch
            assert dealt[rank::4] == list(own)[:4]


def test_a_sampler_goes_on_where_it_was():
    whole, costs = list(batches(drawn(100, 0.5, 0), epochs=2)), drawn(100, 0.5, 0)
    first = batches(costs, epochs=2)
    assert len(first) == len(whole) == 12
    steps = first.steps()
    done = [micro for _ in range(2) for micro in next(steps)]
    second = batches(costs, epochs=2)
    second.load_state_dict(first.state_dict())
    assert done + list(second) == whole
    with pytest.raises(ValueError, match="batch_size=16, but the saved order has 32"):
        batches(costs, batch_size=16).load_state_dict(first.state_dict())


def test_the_recipes_order_divides_the_same_steps_by_cost():
    costs = drawn(64, 0.5, 3)
    sizes = {"num_samples": 64, "micro_batch": 2, "accumulation": 2, "seed": 5, "total_steps": 4}
    plain = Order(**sizes, rank=0, world_size=4)
    ours = replace(plain, costs=lambda step: costs)

    def by_rank(order):
        return [list(replace(order, rank=rank)) for rank in range(4)]

    before, after = by_rank(plain), by_rank(ours)
    for step in range(4):
        window = slice(2 * step, 2 * step + 2)
        of = [{n for rank in found for m in rank[window] for n in m} for found in (before, after)]
        assert of[0] == of[1]
        division = [rank[window] for rank in after]
        assert {len(m) for rank in division for m in rank} == {2}
        assert imbalance(costs, division) < imbalance(costs, [rank[window] for rank in before])


def plain_makespan(costs: list[float], num_stages: int) -> float:
    """Of equal micro-batches: (m + p - 1) of them, forward and backward."""
    return (len(costs) + num_stages - 1) * 3 * costs[0]


def test_a_pipelines_time_is_known_where_micro_batches_are_equal():
    for stages, num in ((1, 3), (2, 4), (4, 8), (8, 32)):
        costs = [2.0] * num
        assert makespan(costs, stages) == pytest.approx(plain_makespan(costs, stages))


def test_a_rising_and_falling_order_shortens_a_pipelines_time():
    found = []
    for seed in range(5):
        costs = drawn(32, 0.5, seed)
        ordered = [costs[n] for n in smooth_order(costs)]
        assert sorted(ordered) == sorted(costs)
        found.append(makespan(ordered, 8) / makespan(costs, 8))
    assert statistics.mean(found) < 0.97
