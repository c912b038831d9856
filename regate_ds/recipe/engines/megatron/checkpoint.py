"""One rank's part of a checkpoint: its cut of weights and optimizer, and random states.

The file belongs to the rank and the layout that wrote it: a resumed run has the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor, nn


def save_rank(checkpoint: Path, chunks: Sequence[nn.Module], optimizer: Any, more: Any) -> None:
    """``more`` is plain values, given back by ``load_rank``."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    state = {
        "weights": [dict(_weights(chunk)) for chunk in chunks],
        "optimizer": [
            {"weights": list(_optimized(inner)), "state": inner.state_dict()}
            for inner in _inner(optimizer)
        ],
        "random": _tracker().get_states(),
        "more": more,
    }
    torch.save(state, _file(checkpoint))


def load_rank(checkpoint: Path, chunks: Sequence[nn.Module], optimizer: Any) -> Any:
    """Take over what ``save_rank`` wrote on the same rank."""
    device = next(chunks[0].parameters()).device
    state = torch.load(_file(checkpoint), map_location=device, weights_only=True)
    with torch.no_grad():
        for chunk, saved in zip(chunks, state["weights"], strict=True):
            for name, weight in _weights(chunk):
                weight.copy_(saved[name])
        for inner, saved in zip(_inner(optimizer), state["optimizer"], strict=True):
            for weight, value in zip(_optimized(inner), saved["weights"], strict=True):
                weight.copy_(value)
            inner.load_state_dict(saved["state"])
    _tracker().set_states({k: v.cpu() for k, v in state["random"].items()})
    return state["more"]


def _tracker() -> Any:
    """Random states of what differs on, or is shared by, the tensor ranks."""
    return get_cuda_rng_tracker()


def _file(checkpoint: Path) -> Path:
    return checkpoint / f"megatron-{dist.get_rank():05d}.pt"


def _weights(chunk: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in chunk.named_parameters():
        yield name, parameter.data


def _inner(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Torch's optimizers inside Megatron's, which hold this rank's part."""
    return [one.optimizer for one in getattr(optimizer, "chained_optimizers", [optimizer])]


def _optimized(inner: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Single-precision weights, or this data rank's part of them."""
    for group in inner.param_groups:
        for parameter in group["params"]:
            yield parameter.data
