"""Send a tensor of any shape from rank to rank of a group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16)
_MOST_DIMS = 4


def send_tensor(x: Tensor, rank: int, group: Any) -> None:
    """Send a tensor of at most four dims to the group's ``rank``, its shape first."""
    head = [_DTYPES.index(x.dtype), x.dim(), *x.shape, *[0] * (_MOST_DIMS - x.dim())]
    dist.send(torch.tensor(head, device=x.device), group=group, group_dst=rank)
    dist.send(x.contiguous(), group=group, group_dst=rank)


def receive_tensor(rank: int, group: Any, device: torch.device) -> Tensor:
    """Receive what the group's ``rank`` sends by ``send_tensor``."""
    head = torch.zeros(2 + _MOST_DIMS, dtype=torch.int64, device=device)
    dist.recv(head, group=group, group_src=rank)
    dtype, num_dims, *sizes = head.tolist()
    x = torch.empty(sizes[:num_dims], dtype=_DTYPES[dtype], device=device)
    dist.recv(x, group=group, group_src=rank)
    return x
