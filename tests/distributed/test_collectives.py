"""The collectives, each against what one process would compute."""

import pytest
import torch
import torch.distributed as dist

from regate_ds.parallel.layout import rank_in, size_of
from regate_ds.parallel.sync import exchange, exchange_counts, sum_over
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.slow


def _sent(rank: int, world_size: int) -> list[list[int]]:
    """What a rank sends to each: as many values as the receiver's number, so none to rank 0."""
    return [[100 * rank + 10 * to + i for i in range(to)] for to in range(world_size)]


def check_collectives(rank: int, world_size: int) -> None:
    group = dist.group.WORLD
    assert (rank_in(group), size_of(group)) == (rank, world_size)
    assert sum_over([rank, 1], group) == [sum(range(world_size)), world_size]
    sent = _sent(rank, world_size)
    num_sent = [len(part) for part in sent]
    num_received = exchange_counts(num_sent, group)
    assert num_received == [rank] * world_size
    flat = torch.tensor(sum(sent, []))
    expected = [n for other in range(world_size) for n in _sent(other, world_size)[rank]]
    assert exchange(flat, num_sent, num_received, group).tolist() == expected


def check_a_part_of_the_world_sums_alone(rank: int) -> None:
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    group = groups[0] if rank < 2 else groups[1]
    assert sum_over([rank + 5], group) == ([11] if rank < 2 else [7])
    assert size_of(group) == (2 if rank < 2 else 1)


@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives_do_what_one_process_would(world_size):
    run_ranks(check_collectives, world_size, world_size)


def test_a_part_of_the_world_sums_alone():
    run_ranks(check_a_part_of_the_world_sums_alone, 3)
