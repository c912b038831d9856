"""One rank's part of a checkpoint: its cut of the weights and the optimizer, and random states.

Only the rank that wrote a file can read it, so a resumed run must have the same layout of ranks.
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
    """Write this rank's file; ``more`` is plain values that ``load_rank`` returns."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    state = {
        "weights": [dict(_weights(chunk)) for chunk in chunks],
        "optimizer": [
            {"weights": list(_optimized(inner)), "state": inner.state_dict()}
            for inner in _torch_optimizers(optimizer)
        ],
        "random": _tracker().get_states(),
        "more": more,
    }
    torch.save(state, _file(checkpoint))


def load_rank(checkpoint: Path, chunks: Sequence[nn.Module], optimizer: Any) -> Any:
    """Load what ``save_rank`` wrote on the same rank, and return its ``more``."""
    device = next(chunks[0].parameters()).device
    state = torch.load(_file(checkpoint), map_location=device, weights_only=True)
    with torch.no_grad():
        for chunk, saved in zip(chunks, state["weights"], strict=True):
            for name, weight in _weights(chunk):
                weight.copy_(saved[name])
        for inner, saved in zip(_torch_optimizers(optimizer), state["optimizer"], strict=True):
            for weight, value in zip(_optimized(inner), saved["weights"], strict=True):
                weight.copy_(value)
            inner.load_state_dict(saved["state"])
    _tracker().set_states({k: v.cpu() for k, v in state["random"].items()})
    return state["more"]


def _tracker() -> Any:
    """Return Megatron's random states: one that tensor ranks share, and one for each."""
    return get_cuda_rng_tracker()


def _file(checkpoint: Path) -> Path:
    return checkpoint / f"megatron-{dist.get_rank():05d}.pt"


def _weights(chunk: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in chunk.named_parameters():
        yield name, parameter.data


def _torch_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Return torch's optimizers inside Megatron's; they hold this rank's part."""
    return [one.optimizer for one in getattr(optimizer, "chained_optimizers", [optimizer])]


def _optimized(inner: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield the single-precision weights that an optimizer updates, or this data rank's part."""
    for group in inner.param_groups:
        for parameter in group["params"]:
            yield parameter.data
