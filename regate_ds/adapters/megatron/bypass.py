"""Take elided rows around the gated layers, and their gradients back.

Elided rows go from the gather to the restore. If both are on one stage, the rows wait in the
micro-batch's ``Bypass``. Otherwise one message takes them directly from the stage that gathers to
the stage that restores, so that edges between stages inside the gated range carry kept rows only; a
second message brings their gradients back. Activation recomputation runs both ends again: the rows
are sent only once, and the rows that arrived are stored for the second run.

Shapes: E elided rows of this rank, H hidden; Megatron's tensors are [S, B, H].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from regate_ds.adapters.megatron.groups import group_device
from regate_ds.adapters.megatron.local.plan import LocalPlan
from regate_ds.parallel.collectives import gather_integers
from regate_ds.parallel.layout import own_group, replicas


class Channel:
    """Messages to and from one other rank, sent in the order of micro-batches in each direction."""

    def __init__(
        self, peer: int, sends: ProcessGroup | None, receives: ProcessGroup | None
    ) -> None:
        """Make one end of a channel.

        peer: rank of the world at the other end.
        sends, receives: one group for each direction, because in a shared group a message would
        wait for one in the other direction.
        """
        self.num_bytes_sent = 0
        self._peer, self._sends, self._receives = peer, sends, receives
        self._leaving: list[tuple[Any, Tensor]] = []

    def send(self, rows_EH: Tensor) -> None:
        """Send the rows without waiting for the other end."""
        if rows_EH.numel() == 0:
            return
        self._leaving = [(work, rows) for work, rows in self._leaving if not work.is_completed()]
        self._leaving.append((dist.isend(rows_EH, self._peer, group=self._sends), rows_EH))
        self.num_bytes_sent += rows_EH.numel() * rows_EH.element_size()

    def receive(self, rows_EH: Tensor) -> Tensor:
        """Fill the tensor with the rows of the next message, and return it."""
        if rows_EH.numel() > 0:
            dist.recv(rows_EH, self._peer, group=self._receives)
        return rows_EH

    def finish(self) -> None:
        """Wait until the other end has received everything that was sent."""
        for work, _ in self._leaving:
            work.wait()
        self._leaving.clear()


def open_channel(pipeline: ProcessGroup, gathers: int, restores: int) -> Channel | None:
    """Open a channel between the stages ``gathers`` and ``restores``; ``None`` on other stages.

    Collective over all ranks of the world.
    """
    ranks, stage = dist.get_process_group_ranks(pipeline), dist.get_rank(pipeline)
    device = group_device()
    pipelines = replicas(gather_integers(min(ranks), device))
    onward, back = own_group(pipelines), own_group(pipelines)
    if stage not in (gathers, restores):
        return None
    peer = ranks[restores if stage == gathers else gathers]
    channel = Channel(peer, *((onward, back) if stage == gathers else (back, onward)))
    # NCCL connects two ranks at their first message, which waits for both ranks. That must not
    # happen inside the schedule, so the first message is sent here.
    first = torch.zeros(1, device=device)
    for sender in (gathers, restores):
        channel.send(first) if stage == sender else channel.receive(first)
    channel.finish()
    return channel


@dataclass
class Bypass:
    """The elided rows of one micro-batch in one model chunk."""

    local: LocalPlan
    channel: Channel | None
    """None if the chunk has both the gather and the restore."""

    rows: Tensor | None = None
    """Rows that wait here [E, H]: for the restore, or for its second run under recomputation."""

    grad: Tensor | None = None
    """Gradients of the rows that wait here for the backward pass of the gather [E, H]."""

    has_left: bool = False
    """Whether the rows are sent or stored already, so that recomputation does not do it again."""

    def leave(self, full: Tensor) -> Tensor:
        """Send or store the elided rows; return the tensor itself.

        In the backward pass its gradient gets the gradients of the elided rows.
        """
        if torch.is_grad_enabled() and not full.requires_grad:
            # With frozen embeddings autograd would not call this backward pass, but the other end
            # sends gradients, which must be received.
            full = full.detach().requires_grad_()
        return _Leave.apply(full, self)

    def join(self, full: Tensor) -> Tensor:
        """Write the elided rows into the tensor, in place, and return it.

        The backward pass sends or stores their gradients.
        """
        return _Join.apply(full, self, torch.is_grad_enabled())

    def depart(self, flat: Tensor) -> None:
        """Send or store the elided rows of the flattened tensor, once."""
        if self.has_left:
            return
        self.has_left = True
        rows_EH = flat.index_select(0, self.elided)
        if self.channel is None:
            self.rows = rows_EH
        else:
            self.channel.send(rows_EH)

    def arrive(self, flat: Tensor, *, is_last: bool) -> Tensor:
        """Return the elided rows; store them for recomputation unless this run is the last."""
        rows_EH, self.rows = self.rows, None
        if rows_EH is None:
            assert self.channel is not None
            rows_EH = self.channel.receive(flat.new_empty(len(self.elided), flat.shape[1]))
        if not is_last:
            self.rows = rows_EH
        return rows_EH

    def return_grad(self, flat: Tensor) -> None:
        """Send or store the gradients of the elided rows."""
        grad_EH = flat.index_select(0, self.elided)
        if self.channel is None:
            self.grad = grad_EH
        else:
            self.channel.send(grad_EH)

    def take_grad(self, flat: Tensor) -> Tensor:
        """Return the gradients of the elided rows, received or stored."""
        if self.channel is not None:
            return self.channel.receive(flat.new_empty(len(self.elided), flat.shape[1]))
        grad_EH, self.grad = self.grad, None
        assert grad_EH is not None
        return grad_EH

    @property
    def elided(self) -> Tensor:
        """Return the indices of the elided rows of this rank."""
        assert self.local.elided_N is not None
        return self.local.elided_N


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full: Tensor, bypass: Bypass) -> Tensor:
        ctx.bypass = bypass
        bypass.depart(full.reshape(-1, full.shape[2]))
        return full

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # The incoming gradient is that of the gather, which is zero at elided rows.
        flat = grads[0].reshape(-1, grads[0].shape[2])
        elided_grad = ctx.bypass.take_grad(flat)
        return flat.index_copy(0, ctx.bypass.elided, elided_grad).view_as(grads[0]), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full: Tensor, bypass: Bypass, is_last: bool) -> Tensor:
        ctx.bypass = bypass
        ctx.mark_dirty(full)
        flat = full.view(-1, full.shape[2])
        flat.index_copy_(0, bypass.elided, bypass.arrive(flat, is_last=is_last))
        return full

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.bypass.return_grad(grads[0].reshape(-1, grads[0].shape[2]))
        # The backward pass goes on with the move of kept rows, which reads only their gradients.
        return grads[0], None, None
