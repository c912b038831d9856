"""The collectives, each against what one process would compute."""

import pytest
import torch
import torch.distributed as dist

from regate_ds.parallel.collectives import (
    all_or_none,
    broadcast_integers,
    exchange,
    exchange_counts,
    gather_values,
    is_same_on_all,
    sum_over,
)
from regate_ds.parallel.layout import rank_in, size_of
from regate_ds.parallel.resharding import Rows, make_route, move_rows
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow


def _sent(rank: int, world_size: int) -> list[list[int]]:
    """What a rank sends to each: as many values as the receiver's number, so none to rank 0."""
    return [[100 * rank + 10 * to + i for i in range(to)] for to in range(world_size)]


def check_collectives(rank: int, world_size: int) -> None:
    group = dist.group.WORLD
    assert (rank_in(group), size_of(group)) == (rank, world_size)
    assert sum_over([rank, 1], group) == [sum(range(world_size)), world_size]
    assert is_same_on_all("one", group)
    assert not is_same_on_all("one" if rank else "other", group)
    with all_or_none(group, num_values=2) as totals:
        totals += [rank, 1]
    assert totals == [sum(range(world_size)), world_size]
    error = ValueError if rank == 1 else RuntimeError
    failing = pytest.raises(error, match="mine" if rank == 1 else "1 other data rank")
    with failing, all_or_none(group):
        if rank == 1:
            raise ValueError("mine")
    sent = _sent(rank, world_size)
    num_sent = [len(part) for part in sent]
    num_received = exchange_counts(num_sent, group)
    assert num_received == [rank] * world_size
    flat = torch.tensor(sum(sent, []))
    expected = [n for other in range(world_size) for n in _sent(other, world_size)[rank]]
    assert exchange(flat, num_sent, num_received, group).tolist() == expected


def check_shared_values(rank: int, world_size: int) -> None:
    group = dist.group.WORLD
    last = world_size - 1
    values = torch.tensor([7, 8, 9], dtype=torch.int32) if rank == last else None
    assert broadcast_integers(values, 3, last, group).tolist() == [7, 8, 9]
    counts = list(range(world_size))
    gathered = gather_values(torch.full((rank,), float(rank)), counts, group)
    assert [part.tolist() for part in gathered] == [[float(r)] * r for r in range(world_size)]


def check_moved_rows(rank: int, world_size: int) -> None:
    """Against one process that holds all rows: forward, and the gradient."""
    generator = torch.Generator().manual_seed(0)
    rows, moved = 6, 3 * world_size
    x = torch.randn(world_size, rows, 2, 4, generator=generator, dtype=torch.double)
    weight = torch.randn(world_size, moved, 1, 4, generator=generator, dtype=torch.double)
    source = torch.randperm(world_size * rows * 2, generator=generator)[:moved]
    target = torch.randperm(world_size * moved, generator=generator)[:moved]
    before = Rows(source // (2 * rows), source % (2 * rows))
    after = Rows(target // moved, target % moved)
    mine = x[rank].clone().requires_grad_()
    route = make_route(before, after, rank, world_size)
    out = move_rows(mine, route, (moved, 1), dist.group.WORLD)
    (out * weight[rank]).sum().backward()
    whole = x.clone().requires_grad_()
    wanted = torch.zeros(world_size * moved, 4, dtype=torch.double)
    wanted = wanted.index_copy(0, target, whole.view(-1, 4)[source]).view_as(weight)
    (wanted * weight).sum().backward()
    assert torch.equal(out, wanted[rank])
    assert torch.equal(mine.grad, whole.grad[rank])


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


def test_shared_values_are_the_same_on_all_ranks():
    run_ranks(check_shared_values, 3, 3)


def test_rows_and_their_gradients_move_as_in_one_process():
    run_ranks(check_moved_rows, 3, 3)
