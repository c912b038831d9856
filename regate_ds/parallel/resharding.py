"""Move rows between the ranks of a group: who sends what is decided from what all ranks know.

A sequence is cut over context ranks in zigzag (rank r of n holds the chunks r and 2n-1-r; of each
sample, where several lie behind one another) and each piece over tensor ranks in order (Megatron's
sequence parallelism). Elision changes the length of the sequence and with it the cut, so kept rows
change owners: one exchange, and its reverse in the backward pass. Nothing is reduced: each row has
one owner before and one after.

Shapes: N moved rows, R rows that a rank holds, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from regate_ds.parallel.collectives import exchange_tensors


@dataclass(frozen=True)
class SequenceCut:
    """How a sequence is divided over a group whose rank is context_rank * tensor_size + tensor."""

    context_size: int = 1
    tensor_size: int = 1

    @property
    def size(self) -> int:
        return self.context_size * self.tensor_size

    @property
    def zigzag(self) -> int:
        """Chunks that context ranks cut a sample into; its length must be a multiple of it."""
        return 2 * self.context_size if self.context_size > 1 else 1

    @property
    def multiple(self) -> int:
        """What the length of a sequence must be a multiple of."""
        return self.zigzag * self.tensor_size

    def owners(self, *lengths: int) -> tuple[Tensor, Tensor]:
        """For each index of a sequence, the rank that holds it and its index there."""
        length = sum(lengths)
        if length % self.multiple or any(n % self.zigzag for n in lengths):
            raise ValueError(
                f"a sequence of {length} rows cannot be cut over {self.context_size} context and "
                f"{self.tensor_size} tensor ranks; its length must be a multiple of {self.multiple}"
            )
        held = self.held(*lengths)
        rank, place = torch.empty(length, dtype=torch.long), torch.empty(length, dtype=torch.long)
        for number, index_R in enumerate(held):
            rank[index_R], place[index_R] = number, torch.arange(len(index_R))
        return rank, place

    def held(self, *lengths: int) -> list[Tensor]:
        """The indices of a sequence that each rank holds, in its order.

        lengths: of the samples that lie behind one another in it; each is in zigzag by itself.
        """
        pieces = [torch.arange(sum(lengths))]
        if self.context_size > 1:
            samples = [index.chunk(self.zigzag) for index in pieces[0].split(lengths)]
            pieces = [
                torch.cat([part for chunks in samples for part in (chunks[r], chunks[-1 - r])])
                for r in range(self.context_size)
            ]
        return [part for piece in pieces for part in piece.chunk(self.tensor_size)]


@dataclass(frozen=True)
class Rows:
    """N rows by where they lie: rank of the group, and row there."""

    rank_N: Tensor
    row_N: Tensor

    def __getitem__(self, which: Tensor) -> Rows:
        return Rows(self.rank_N[which], self.row_N[which])


@dataclass(frozen=True)
class Route:
    """One rank's part in moving rows: what it sends, by destination, and where arrivals go."""

    sent_N: Tensor
    """Rows here that leave, ordered by destination rank; rows that stay are sent to oneself."""

    num_sent: list[int]
    placed_N: Tensor
    """Row here for each arrival, ordered by source rank."""

    num_received: list[int]

    def to(self, device: torch.device | str) -> Route:
        return Route(
            self.sent_N.to(device),
            self.num_sent,
            self.placed_N.to(device),
            self.num_received,
        )

    @property
    def reversed(self) -> Route:
        """The way back."""
        return Route(self.placed_N, self.num_received, self.sent_N, self.num_sent)

    def num_crossing(self, rank: int) -> int:
        """Rows that leave this rank for another."""
        return sum(self.num_sent) - self.num_sent[rank]


def make_route(before: Rows, after: Rows, rank: int, size: int) -> Route:
    """The part of ``rank`` of ``size`` in moving row ``before[i]`` to ``after[i]`` for all i.

    Each row moves at most once; a row after the move that nothing arrives at is zero.
    """
    leaving = (before.rank_N == rank).nonzero().squeeze(1)
    leaving = leaving[after.rank_N[leaving].argsort(stable=True)]
    arriving = (after.rank_N == rank).nonzero().squeeze(1)
    arriving = arriving[before.rank_N[arriving].argsort(stable=True)]
    return Route(
        sent_N=before.row_N[leaving],
        num_sent=torch.bincount(after.rank_N[leaving], minlength=size).tolist(),
        placed_N=after.row_N[arriving],
        num_received=torch.bincount(before.rank_N[arriving], minlength=size).tolist(),
    )


def move_rows(
    x: Tensor, route: Route, shape_after: tuple[int, int], group: ProcessGroup | None
) -> Tensor:
    """The rows of x [S, B, H] after the move, [*shape_after, H]. Differentiable.

    All ranks of the group must call it.
    """
    return _Move.apply(x, route, shape_after, group)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, route: Route, shape_after: tuple[int, int], group: ProcessGroup | None
    ) -> Tensor:
        ctx.route, ctx.group, ctx.shape_before = route, group, x.shape[:2]
        sent_NH = x.reshape(-1, x.shape[2]).index_select(0, route.sent_N)
        arrived_NH = exchange_tensors(sent_NH, route.num_sent, route.num_received, group)
        return _placed(arrived_NH, route.placed_N, shape_after)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        route: Route = ctx.route
        sent_NH = grads[0].reshape(-1, grads[0].shape[2]).index_select(0, route.placed_N)
        arrived_NH = exchange_tensors(sent_NH, route.num_received, route.num_sent, ctx.group)
        return _placed(arrived_NH, route.sent_N, ctx.shape_before), None, None, None


def _placed(rows_NH: Tensor, where_N: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of its own, not a view: Megatron's schedules free the data of what a stage sends."""
    placed = rows_NH.new_zeros(*shape, rows_NH.shape[1])
    placed.view(-1, rows_NH.shape[1]).index_copy_(0, where_N, rows_NH)
    return placed
