"""In which order samples are seen: every sample once an epoch, in another order each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from regate_ds.recipe.order import Order

ORDER = Order(
    num_samples=29,
    micro_batch=2,
    accumulation=3,
    rank=0,
    world_size=2,
    seed=5,
    total_steps=6,
)
"""12 samples a step, 2 steps an epoch, 5 samples left out of each."""


def steps(order: Order) -> list[list[list[list[int]]]]:
    """Sample numbers by step, micro-batch and rank."""
    ranks = [list(replace(order, rank=rank)) for rank in range(order.world_size)]
    micro = [list(pair) for pair in zip(*ranks, strict=True)]
    return [micro[i : i + order.accumulation] for i in range(0, len(micro), order.accumulation)]


def flat(nested: list) -> list[int]:
    return [n for part in nested for n in flat(part)] if isinstance(nested, list) else [nested]


def test_no_sample_comes_twice_in_an_epoch_and_each_epoch_has_an_order_of_its_own():
    found = steps(ORDER)
    epochs = [flat(found[i : i + 2]) for i in range(0, 6, 2)]
    assert all(len(set(epoch)) == 24 and set(epoch) <= set(range(29)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_step_sees_the_same_samples_however_it_is_cut():
    wanted = [sorted(flat(step)) for step in steps(ORDER)]
    for cut in ({"world_size": 1, "accumulation": 6}, {"micro_batch": 6, "accumulation": 1}):
        assert [sorted(flat(step)) for step in steps(replace(ORDER, **cut))] == wanted


def test_micro_batches_come_one_after_the_other_and_ranks_side_by_side():
    one = replace(ORDER, world_size=1, accumulation=1, micro_batch=12)
    whole = [flat(step) for step in steps(one)]
    assert [flat(step) for step in steps(ORDER)] == whole


def test_a_later_start_goes_on_where_the_run_was():
    assert steps(replace(ORDER, start_step=3)) == steps(ORDER)[3:]
    assert len(replace(ORDER, start_step=3)) == 9


def test_the_order_follows_from_the_seed_alone():
    assert steps(ORDER) == steps(replace(ORDER))
    assert steps(ORDER) != steps(replace(ORDER, seed=6))


def test_a_set_too_small_for_a_step_is_refused():
    with pytest.raises(ValueError, match="11 samples do not fill one optimizer step of 12"):
        replace(ORDER, num_samples=11)
