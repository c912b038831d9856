"""A world of 4,096 ranks, imagined in one process."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("megatron.core", reason="pip install 'regate-ds[megatron]'")

import torch.distributed as dist

from regate_ds.recipe.estimate import megatron_world as dry_run
from regate_ds.recipe.estimate.megatron_world import World


def test_every_rank_of_4096_knows_its_shapes_and_bytes_in_seconds():
    world, start = World(num_micro=4), time.monotonic()
    rows = dry_run.rows_of(world)
    assert [row.rank for row in rows] == list(range(4096))
    for data_rank in range(world.data):
        replica = [row for row in rows if row.data == data_rank]
        assert len(replica) == 128
        # Static shapes: all ranks of a replica hold equally many rows, and hear one plan.
        assert len({row.kept_rows for row in replica}) == 1
        assert len({row.plan_bytes for row in replica}) == 1
        assert sum(row.store_bytes > 0 for row in replica) == 1
        # Each of the 7 edges is crossed twice, on each of 16 tensor and context ranks.
        edge = replica[0].kept_rows * world.hidden * world.num_bytes
        assert sum(row.p2p_bytes for row in replica) == 7 * 2 * 16 * edge
        full = world.num_micro * world.num_tokens // world.cut.size
        assert 0 < replica[0].kept_rows < full
        # Only the stage of layer 0 cuts anew, and moves no more than all kept rows.
        moved = [row.gather_bytes for row in replica]
        assert 0 < sum(moved) <= 16 * edge
        assert all(row.gather_bytes == 0 for row in replica if row.stage > 0)
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("rank", [0, 1234])
def test_the_products_own_groups_and_exchange_fit_that_world(rank: int):
    world = World(num_micro=1)
    # The first replica's planner sends; other ranks of the fake network receive nothing.
    planner = dry_run.ranks_of(world).index((0, 0, world.pipeline - 1, 0))
    with dry_run.joined(world, rank) as axes:
        assert dist.get_world_size(axes.replica.group) == 128
        assert dist.get_world_size(axes.split) == 16
        assert dist.get_world_size(axes.data) == 32
        assert (axes.replica.planner == rank) == (dry_run.ranks_of(world)[rank][:3] == (0, 0, 7))
        assert axes.replica.planner in dist.get_process_group_ranks(axes.replica.group)
    with dry_run.joined(world, planner) as axes:
        assert axes.replica.planner == planner
        shape = dry_run.exchange_plans(world, axes)
    assert shape[1:] == (1, world.hidden)
    assert 0 < shape[0] < world.num_tokens // 16
