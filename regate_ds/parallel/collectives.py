"""Every collective that the method issues. Each is the identity where the group is ``None``.

``device`` is where the group's backend wants its tensors: "cpu" for gloo, the rank's GPU for NCCL.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def sum_over(
    values: Sequence[int], group: ProcessGroup | None, device: torch.device | str = "cpu"
) -> list[int]:
    """Sum each of these integers over the ranks of a group: one collective, the same result on all.

    All ranks of the group must call it, with equally many values.
    """
    if group is None:
        return list(values)
    totals = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(totals, group=group)
    return totals.tolist()


def is_same_on_all(
    text: str, group: ProcessGroup | None, device: torch.device | str = "cpu"
) -> bool:
    """Whether all ranks have given the same text; by a hash. All ranks must call it."""
    # As many bits as add up, over ten thousand ranks, to an int64.
    mine = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little")
    (total,) = sum_over([mine], group, device)
    return group is None or total == mine * dist.get_world_size(group)


@contextmanager
def all_or_none(
    group: ProcessGroup | None, device: torch.device | str = "cpu", *, num_values: int = 0
) -> Iterator[list[int]]:
    """Run a block on every rank of a group: an error on one is an error on all, none waits.

    One collective, when the block ends; inside it there must be none of this group. It also sums
    the ``num_values`` integers that the block puts into the list.

    RuntimeError on ranks whose own block did not fail.
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
            f"{num_failed} other data ranks failed in this step; their own errors say why"
        )


def gather_integers(value: int, device: torch.device | str = "cpu") -> list[int]:
    """The integer of every rank of the world, by rank. All ranks must call it."""
    mine = torch.tensor([value], dtype=torch.int64, device=device)
    found = torch.empty(dist.get_world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(found, mine)
    return found.tolist()


def exchange_counts(
    num_sent: list[int], group: ProcessGroup | None, device: torch.device | str = "cpu"
) -> list[int]:
    """Tell each rank how much it will be sent; learn how much each rank will send here."""
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

    ``num_sent[r]`` consecutive values go to rank r and ``num_received[r]`` come from it; any of
    them may be 0. All ranks of the group must call it.
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
    """Like ``exchange``, for rows that lie where the group's backend wants them already."""
    if group is None:
        return rows_NH
    received = rows_NH.new_empty(sum(num_received), *rows_NH.shape[1:])
    dist.all_to_all_single(received, rows_NH.contiguous(), num_received, num_sent, group=group)
    return received


def broadcast_integers(
    values: Tensor | None, length: int, source: int, group: ProcessGroup | None
) -> Tensor:
    """Give every rank of the group the int32 values of the rank ``source`` (of the world)."""
    if group is None:
        assert values is not None
        return values
    if values is None:
        values = torch.empty(length, dtype=torch.int32)
    dist.broadcast(values, source, group=group)
    return values


def gather_values(
    values_N: Tensor, num_values: list[int], group: ProcessGroup | None
) -> list[Tensor]:
    """Every rank's values, by rank; ``num_values`` says how many each has."""
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
    """Every rank's int64 values, of any number, by rank, on the CPU."""
    if group is None:
        return [values_N]
    mine = torch.tensor([len(values_N)], dtype=torch.int64, device=device)
    counts = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, mine, group=group)
    found = gather_values(values_N.to(device), counts.tolist(), group)
    return [vector.cpu() for vector in found]


def max_tensor(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """The largest of the ranks' values, element by element, in place; on the group's device."""
    if group is not None:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values


def sum_tensor(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of the ranks' values, element by element, in place; on the group's device."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def broadcast_text(
    text: str, group: ProcessGroup | None, device: torch.device | str = "cpu"
) -> str:
    """The group's first rank's text for every rank of the group."""
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
