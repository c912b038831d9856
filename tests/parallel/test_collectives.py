"""Without a group every collective is the identity, and needs no initialised backend."""

import torch
import torch.distributed as dist

from regate_ds.parallel.collectives import (
    broadcast_integers,
    exchange,
    exchange_counts,
    exchange_tensors,
    gather_values,
    sum_over,
)
from regate_ds.parallel.layout import ParallelLayout, rank_in, size_of


def test_a_layout_uses_no_axis_unless_told():
    assert (ParallelLayout().data, ParallelLayout().replica) == (None, None)


def test_a_process_without_a_group_is_rank_zero_of_one():
    assert (rank_in(None), size_of(None)) == (0, 1)


def test_without_a_group_collectives_are_the_identity():
    assert not dist.is_initialized()
    values_N = torch.tensor([3.0, 1.0])
    assert sum_over([4, 5], None) == [4, 5]
    assert exchange_counts([2], None) == [2]
    assert torch.equal(exchange(values_N, [2], [2], None), values_N)
    assert torch.equal(exchange_tensors(values_N[:, None], [2], [2], None), values_N[:, None])
    assert torch.equal(broadcast_integers(values_N.int(), 2, 0, None), values_N.int())
    assert torch.equal(gather_values(values_N, [2], None)[0], values_N)
