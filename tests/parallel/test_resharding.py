"""Rows move to where a plan says: every rank's part in it fits the others'."""

from __future__ import annotations

import pytest
import torch

from regate_ds.parallel.layout import replicas
from regate_ds.parallel.resharding import Route, Rows, SequenceCut, make_route, move_rows

CUTS = [SequenceCut(), SequenceCut(2), SequenceCut(1, 4), SequenceCut(2, 2), SequenceCut(4, 2)]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_index_has_one_owner(cut: SequenceCut):
    length = 2 * cut.multiple
    rank, place = cut.owners(length)
    held = cut.held(length)
    assert sorted(torch.cat(held).tolist()) == list(range(length))
    for index in range(length):
        assert int(held[int(rank[index])][int(place[index])]) == index


def test_context_ranks_hold_a_chunk_of_each_end_and_tensor_ranks_cut_it_in_order():
    held = SequenceCut(2, 2).held(16)
    assert [part.tolist() for part in held] == [
        [0, 1, 2, 3],
        [12, 13, 14, 15],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]


def test_samples_behind_one_another_are_each_in_zigzag():
    assert [part.tolist() for part in SequenceCut(2, 2).held(4, 8, 4)] == [
        [0, 3, 4, 5],
        [10, 11, 12, 15],
        [1, 2, 6, 7],
        [8, 9, 13, 14],
    ]


@pytest.mark.parametrize("lengths", [(12,), (2, 6)])
def test_a_length_that_does_not_divide_is_refused(lengths: tuple[int, ...]):
    with pytest.raises(ValueError, match="multiple of 8"):
        SequenceCut(2, 2).owners(*lengths)


def routes(before: Rows, after: Rows, size: int) -> list[Route]:
    return [make_route(before, after, rank, size) for rank in range(size)]


def test_what_a_rank_sends_is_what_the_other_expects():
    generator = torch.Generator().manual_seed(0)
    size, moved = 4, 40
    before = Rows(torch.randint(size, (moved,), generator=generator), torch.arange(moved))
    after = Rows(torch.randint(size, (moved,), generator=generator), torch.randperm(moved))
    made = routes(before, after, size)
    for sender in range(size):
        for receiver in range(size):
            assert made[sender].num_sent[receiver] == made[receiver].num_received[sender]
    # Deliver by hand: the row's number is its content.
    boxes = [route.sent_N.split(route.num_sent) for route in made]
    for receiver, route in enumerate(made):
        arrived = torch.cat([boxes[sender][receiver] for sender in range(size)])
        for content, place in zip(arrived.tolist(), route.placed_N.tolist(), strict=True):
            assert int(after.rank_N[content]) == receiver
            assert int(after.row_N[content]) == place


def test_gradients_go_back_the_way_rows_came():
    x = torch.randn(5, 2, 3, dtype=torch.double, requires_grad=True)
    before = Rows(torch.zeros(4, dtype=torch.long), torch.tensor([7, 1, 3, 8]))
    after = Rows(torch.zeros(4, dtype=torch.long), torch.arange(4))
    route = make_route(before, after, 0, 1)
    moved = move_rows(x, route, (3, 2), None)
    assert torch.equal(moved.view(6, 3)[:4], x.view(10, 3)[[7, 1, 3, 8]])
    assert not moved.view(6, 3)[4:].any()
    assert torch.autograd.gradcheck(lambda t: move_rows(t, route, (3, 2), None), x)


def test_replicas_are_the_ranks_of_one_data_rank():
    assert replicas([0, 0, 1, 1, 0, 0, 1, 1]) == [[0, 1, 4, 5], [2, 3, 6, 7]]
