"""Plans of merged steps on the way to the other ranks of a replica."""

from __future__ import annotations

import random
from dataclasses import fields, replace

import pytest
import torch

from regate_ds.adapters.plan_wire import decode, encode
from regate_ds.algorithm.counts import COUNTS
from regate_ds.algorithm.executions.merge import plan_merged_window
from regate_ds.algorithm.plan import StepPlan, plan_dense
from regate_ds.algorithm.rows import RowLayout
from tests.algorithm.plain_plan_helper import wild_batch


@pytest.mark.parametrize("size", [2, 5])
def test_a_merged_plan_arrives_as_it_was_sent(size: int):
    rng = random.Random(size)
    for _ in range(10):
        window = [wild_batch(rng, images=True) for _ in range(3)]
        micro = tuple(
            replace(one, step=4) for one in plan_merged_window(window, RowLayout(), size=size)
        )
        sent = StepPlan(4, False, micro, 17, dict.fromkeys(COUNTS, 1), is_merged=True)
        found = decode(*encode(sent))
        assert found.is_merged
        assert not found.is_dense
        for one, other in zip(found.micro, sent.micro, strict=True):
            assert (one.num_tokens, one.is_packed, one.moves_rows, one.step, one.micro) == (
                *(other.num_tokens, other.is_packed, other.moves_rows, other.step, other.micro),
            )
            assert one.patches is not None
            assert other.patches is not None
            for name in ("kept_BK", "segment_BK", "slot_R", "position_R", "label_slot_L"):
                assert torch.equal(getattr(one, name), getattr(other, name)), name
            for name in ("label_position_L", "targets_L"):
                assert torch.equal(getattr(one, name), getattr(other, name)), name
            for field in fields(one.patches):
                mine, theirs = (getattr(x.patches, field.name) for x in (one, other))
                same = mine == theirs if isinstance(mine, int) else torch.equal(mine, theirs)
                assert same, field.name


def test_other_plans_carry_nothing_of_it():
    window = [wild_batch(random.Random(3))]
    micro = tuple(map(plan_dense, window))
    header, array = encode(StepPlan(0, True, micro, 5, dict.fromkeys(COUNTS, 1)))
    num_runs = len(micro[0].token_run_lengths)
    assert len(array) == 10 + num_runs + micro[0].segment_BK.numel() + 2 * micro[0].num_targets
    assert header[4] == 1
    assert decode(header, array).micro[0].patches is None
