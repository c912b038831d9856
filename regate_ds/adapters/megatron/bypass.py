"""Elided rows go around the gated layers: from the gather to the restore, their gradients back.

Inside a stage they wait at the micro-batch's ``Bypass``. Between stages one message takes them
straight from the stage that gathers to the one that restores, past the stages between, so that
edges inside the gated range carry kept rows only; one more brings their gradients back. Activation
recomputation runs both ends again: rows leave once, and what has arrived is held for it.

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
from regate_ds.adapters.megatron.local_plan import LocalPlan
from regate_ds.parallel.collectives import gather_integers
from regate_ds.parallel.layout import own_group, replicas


class Channel:
    """Messages to and from the rank at the other end, each way in the order of micro-batches."""

    def __init__(
        self, peer: int, sends: ProcessGroup | None, receives: ProcessGroup | None
    ) -> None:
        """Each way has a group of its own: in one, a message would wait for one the other way."""
        self.num_bytes_sent = 0
        self._peer, self._sends, self._receives = peer, sends, receives
        self._leaving: list[tuple[Any, Tensor]] = []

    def send(self, rows_EH: Tensor) -> None:
        """Without waiting for the other end."""
        if rows_EH.numel() == 0:
            return
        self._leaving = [(work, rows) for work, rows in self._leaving if not work.is_completed()]
        self._leaving.append((dist.isend(rows_EH, self._peer, group=self._sends), rows_EH))
        self.num_bytes_sent += rows_EH.numel() * rows_EH.element_size()

    def receive(self, rows_EH: Tensor) -> Tensor:
        if rows_EH.numel() > 0:
            dist.recv(rows_EH, self._peer, group=self._receives)
        return rows_EH

    def finish(self) -> None:
        """Until all that was sent has been taken."""
        for work, _ in self._leaving:
            work.wait()
        self._leaving.clear()


def open_channel(pipeline: ProcessGroup, gathers: int, restores: int) -> Channel | None:
    """Between these two stages; ``None`` on other stages. Collective over the world."""
    ranks, stage = dist.get_process_group_ranks(pipeline), dist.get_rank(pipeline)
    device = group_device()
    pipelines = replicas(gather_integers(min(ranks), device))
    onward, back = own_group(pipelines), own_group(pipelines)
    if stage not in (gathers, restores):
        return None
    peer = ranks[restores if stage == gathers else gathers]
    channel = Channel(peer, *((onward, back) if stage == gathers else (back, onward)))
    # NCCL connects two ranks at their first message, which waits for both: not in the schedule.
    first = torch.zeros(1, device=device)
    for sender in (gathers, restores):
        channel.send(first) if stage == sender else channel.receive(first)
    channel.finish()
    return channel


@dataclass
class Bypass:
    """The elided rows of one micro-batch, in one model chunk."""

    local: LocalPlan
    channel: Channel | None
    """None: the chunk has both the gather and the restore."""

    rows: Tensor | None = None
    grad: Tensor | None = None
    has_left: bool = False

    def leave(self, full: Tensor) -> Tensor:
        """The rows take their way; the same tensor, whose gradient will have theirs again."""
        if torch.is_grad_enabled() and not full.requires_grad:
            # Frozen embeddings: gradients are on their way back, someone must take them in.
            full = full.detach().requires_grad_()
        return _Leave.apply(full, self)

    def join(self, full: Tensor) -> Tensor:
        """Put the rows in their places of a tensor that is changed. Gradients start back."""
        return _Join.apply(full, self, torch.is_grad_enabled())

    def depart(self, flat: Tensor) -> None:
        if self.has_left:
            return
        self.has_left = True
        rows_EH = flat.index_select(0, self.elided)
        if self.channel is None:
            self.rows = rows_EH
        else:
            self.channel.send(rows_EH)

    def arrive(self, flat: Tensor, *, is_last: bool) -> Tensor:
        rows_EH, self.rows = self.rows, None
        if rows_EH is None:
            assert self.channel is not None
            rows_EH = self.channel.receive(flat.new_empty(len(self.elided), flat.shape[1]))
        if not is_last:
            self.rows = rows_EH
        return rows_EH

    def return_grad(self, flat: Tensor) -> None:
        grad_EH = flat.index_select(0, self.elided)
        if self.channel is None:
            self.grad = grad_EH
        else:
            self.channel.send(grad_EH)

    def take_grad(self, flat: Tensor) -> Tensor:
        if self.channel is not None:
            return self.channel.receive(flat.new_empty(len(self.elided), flat.shape[1]))
        grad_EH, self.grad = self.grad, None
        assert grad_EH is not None
        return grad_EH

    @property
    def elided(self) -> Tensor:
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
        # What flows back comes from the gather, whose gradient is zero at elided rows.
        flat = grads[0].reshape(-1, grads[0].shape[2])
        taken = ctx.bypass.take_grad(flat)
        return flat.index_copy(0, ctx.bypass.elided, taken).view_as(grads[0]), None


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
        # Going on, only the kept rows of it are taken.
        return grads[0], None, None
