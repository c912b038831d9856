"""Move rows between the ranks of a group; each rank works out alone who sends which row to whom.

Context ranks cut a sequence in zigzag: rank r of n holds the chunks r and 2n-1-r, of each sample if
the sequence holds several one after the other. Tensor ranks then cut each piece in order, as in
Megatron's sequence parallelism. Elision shortens the sequence and so changes the cut: kept rows
change owners in one exchange, and go back in the backward pass. Nothing is reduced, because each
row has one owner before and one after.

Shapes: N moved rows, R rows that a rank holds, H hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from regate_ds.algorithm.rows import RowFormat, RowLayout
from regate_ds.parallel.collectives import exchange_tensors


@dataclass(frozen=True)
class SequenceCut:
    """How a sequence is cut over a group; rank = context_rank * tensor_size + tensor_rank."""

    context_size: int = 1
    tensor_size: int = 1

    @property
    def size(self) -> int:
        return self.context_size * self.tensor_size

    @property
    def zigzag(self) -> int:
        """Number of chunks that context ranks cut a sample into; it must divide the length."""
        return 2 * self.context_size if self.context_size > 1 else 1

    @property
    def multiple(self) -> int:
        """Number that the length of a sequence must be a multiple of."""
        return self.zigzag * self.tensor_size

    def row_layout(
        self, row_format: RowFormat, token_multiple: int, row_multiple: int = 1
    ) -> RowLayout:
        """Return how kept rows must lie to be cut so.

        token_multiple: what the user wants. row_multiple: what the number of rows of each rank must
        be a multiple of.
        """
        multiple = math.lcm(token_multiple, self.multiple, row_multiple * self.size)
        if row_format == "padded":
            return RowLayout(multiple=multiple, equal=True)
        # Context ranks cut every sample of ragged rows, so that each is filled up by itself.
        return RowLayout(row_format="ragged", multiple=multiple, sample_multiple=self.zigzag)

    def owners(self, *lengths: int) -> tuple[Tensor, Tensor]:
        """Return, for each row of a sequence, the rank that holds it and its index on that rank.

        lengths: those of the samples in the sequence. ValueError if they cannot be cut.
        """
        length = sum(lengths)
        if length % self.multiple or any(n % self.zigzag for n in lengths):
            raise ValueError(
                f"a sequence of {length} rows (samples of {list(lengths)}) cannot be cut over "
                f"{self.context_size} context and {self.tensor_size} tensor ranks; make its length "
                f"a multiple of {self.multiple}, and each sample's a multiple of {self.zigzag}"
            )
        owner, index = torch.empty(length, dtype=torch.long), torch.empty(length, dtype=torch.long)
        for rank, held_R in enumerate(self.held(*lengths)):
            owner[held_R], index[held_R] = rank, torch.arange(len(held_R))
        return owner, index

    def held(self, *lengths: int) -> list[Tensor]:
        """Return for each rank the rows of a sequence that it holds, in its order.

        lengths: those of the samples in the sequence; each is cut in zigzag by itself.
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
    """The places of N rows: the rank of the group that holds each, and its row on that rank."""

    rank_N: Tensor
    row_N: Tensor

    def __getitem__(self, which: Tensor) -> Rows:
        return Rows(self.rank_N[which], self.row_N[which])


@dataclass(frozen=True)
class Route:
    """One rank's part in moving rows: which rows it sends where, and where arriving rows go."""

    sent_N: Tensor
    """Rows of this rank to send, ordered by destination rank; rows that stay are among them."""

    num_sent: list[int]
    """Number of rows for each destination rank."""

    placed_N: Tensor
    """Row of this rank for each arriving row, ordered by source rank."""

    num_received: list[int]
    """Number of rows from each source rank."""

    def to(self, device: torch.device | str) -> Route:
        return Route(
            self.sent_N.to(device),
            self.num_sent,
            self.placed_N.to(device),
            self.num_received,
        )

    @property
    def reversed(self) -> Route:
        """The route that brings the rows back."""
        return Route(self.placed_N, self.num_received, self.sent_N, self.num_sent)

    def num_crossing(self, rank: int) -> int:
        """Return the number of rows that leave this rank for another."""
        return sum(self.num_sent) - self.num_sent[rank]


def make_route(before: Rows, after: Rows, rank: int, size: int) -> Route:
    """Make the route of ``rank`` of ``size`` for moving row ``before[i]`` to ``after[i]``, all i.

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
    """Return the rows of x [S, B, H] after the move, [*shape_after, H]. Differentiable.

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


def _placed(rows_NH: Tensor, index_N: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a new tensor, not a view: Megatron's schedules free the data of what a stage sends."""
    placed = rows_NH.new_zeros(*shape, rows_NH.shape[1])
    placed.view(-1, rows_NH.shape[1]).index_copy_(0, index_N, rows_NH)
    return placed
