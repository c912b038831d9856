"""Every collective that the method calls. Where ``group`` is ``None``, this rank is alone.

``device`` is where the group's backend wants its tensors: "cpu" for gloo, the rank's GPU for NCCL.
Unless a docstring says otherwise, all ranks of the group must make the call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def sum_over(
    values: Sequence[int], group: ProcessGroup | None, device: torch.device | str = "cpu"
) -> list[int]:
    """Sum each of these integers over the ranks of a group, in one collective.

    All ranks must give equally many values; all get the same sums.
    """
    if group is None:
        return list(values)
    totals = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(totals, group=group)
    return totals.tolist()


def is_same_on_all(
    text: str, group: ProcessGroup | None, device: torch.device | str = "cpu"
) -> bool:
    """Return whether all ranks give the same text; hashes of it are compared."""
    # 48 bits: the sum over ten thousand ranks still fits an int64.
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little")
    (total,) = sum_over([digest], group, device)
    return group is None or total == digest * dist.get_world_size(group)


@contextmanager
def all_or_none(
    group: ProcessGroup | None, device: torch.device | str = "cpu", *, num_values: int = 0
) -> Iterator[list[int]]:
    """Run a block on every rank of a group; if it fails on one rank, all ranks raise.

    The one collective runs when the block ends; the block itself must call none of this group. It
    also sums, over the ranks, the ``num_values`` integers that the block puts into the list.

    RuntimeError on the ranks whose own block did not fail.
    """
    values: list[int] = []
    try:
        yield values
        assert len(values) == num_values
    except BaseException:
        sum_over([1, *[0] * num_values], group, device)
        raise
    num_failed, *values[:] = sum_over([0, *values], group, device)
    if num_failed:
        raise RuntimeError(
            f"{num_failed} other data ranks failed in this step; their own errors name the cause"
        )


def gather_integers(value: int, device: torch.device | str = "cpu") -> list[int]:
    """Return the integers of all ranks of the world, by rank. Collective over the world."""
    local = torch.tensor([value], dtype=torch.int64, device=device)
    gathered = torch.empty(dist.get_world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(gathered, local)
    return gathered.tolist()


def exchange_counts(
    num_sent: list[int], group: ProcessGroup | None, device: torch.device | str = "cpu"
) -> list[int]:
    """Tell each rank how many values it will be sent; return how many each rank will send here."""
    if group is None:
        return num_sent
    sent = torch.tensor(num_sent, dtype=torch.int64, device=device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.tolist()


def exchange(
    sent_N: Tensor,
    num_sent: list[int],
    num_received: list[int],
    group: ProcessGroup | None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Send each rank its slice of ``sent_N``; return what the ranks sent here, by rank, on the CPU.

    ``num_sent[r]`` consecutive values go to rank r and ``num_received[r]`` come from it; either may
    be 0.
    """
    if group is None:
        return sent_N
    received_M = torch.empty(sum(num_received), dtype=sent_N.dtype, device=device)
    dist.all_to_all_single(
        received_M, sent_N.to(device).contiguous(), num_received, num_sent, group=group
    )
    return received_M.cpu()


def exchange_tensors(
    rows_NH: Tensor, num_sent: list[int], num_received: list[int], group: ProcessGroup | None
) -> Tensor:
    """Send rows as ``exchange`` does, where they are already on the device of the backend."""
    if group is None:
        return rows_NH
    received = rows_NH.new_empty(sum(num_received), *rows_NH.shape[1:])
    dist.all_to_all_single(received, rows_NH.contiguous(), num_received, num_sent, group=group)
    return received


def broadcast_integers(
    values: Tensor | None,
    length: int,
    source: int,
    group: ProcessGroup | None,
    dtype: torch.dtype = torch.int32,
) -> Tensor:
    """Return, on every rank of the group, the integers of the rank ``source`` of the world.

    values: given on that rank; the others pass None, and how many there are.
    """
    if group is None:
        assert values is not None
        return values
    if values is None:
        values = torch.empty(length, dtype=dtype)
    dist.broadcast(values, source, group=group)
    return values


def gather_values(
    values_N: Tensor, num_values: list[int], group: ProcessGroup | None
) -> list[Tensor]:
    """Return the values of all ranks, by rank; ``num_values`` says how many each rank has."""
    if group is None:
        return [values_N]
    longest = max(num_values)
    padded = values_N.new_zeros(longest)
    padded[: len(values_N)] = values_N
    gathered = [torch.empty_like(padded) for _ in num_values]
    dist.all_gather(gathered, padded, group=group)
    return [row[:n] for row, n in zip(gathered, num_values, strict=True)]


def gather_vectors(
    values_N: Tensor, group: ProcessGroup | None, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """Return the int64 values of all ranks, by rank, on the CPU; each may have any number."""
    if group is None:
        return [values_N]
    length = torch.tensor([len(values_N)], dtype=torch.int64, device=device)
    lengths = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(lengths, length, group=group)
    gathered = gather_values(values_N.to(device), lengths.tolist(), group)
    return [vector.cpu() for vector in gathered]


def gather_objects(value: Any, group: ProcessGroup | None) -> list[Any]:
    """Return what each rank gives, by rank; it is pickled on the way."""
    if group is None:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def max_tensor(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Replace each element by the largest over the ranks; the tensor is on the group's device."""
    if group is not None:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values


def sum_tensor(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Replace each element by the sum over the ranks; the tensor is on the group's device."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def broadcast_text(
    text: str, group: ProcessGroup | None, device: torch.device | str = "cpu"
) -> str:
    """Return the text of the group's first rank on every rank of the group."""
    if group is None:
        return text
    encoded = text.encode()
    size = torch.tensor(len(encoded), device=device)
    dist.broadcast(size, group_src=0, group=group)
    content = torch.zeros(int(size), dtype=torch.uint8, device=device)
    if dist.get_rank(group) == 0:
        content = torch.tensor(list(encoded), dtype=torch.uint8, device=device)
    dist.broadcast(content, group_src=0, group=group)
    return bytes(content.tolist()).decode()


def gather_rows(
    rows_NC: Tensor, group: ProcessGroup | None, device: torch.device | str = "cpu"
) -> tuple[Tensor, int]:
    """Return every rank's int64 rows, by rank, on the CPU, and where this rank's begin."""
    if group is None:
        return rows_NC, 0
    width = rows_NC.shape[1]
    found = [flat.view(-1, width) for flat in gather_vectors(rows_NC.flatten(), group, device)]
    start = sum(len(rows) for rows in found[: dist.get_rank(group)])
    return torch.cat(found), start
