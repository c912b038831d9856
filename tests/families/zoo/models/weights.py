"""Random weights under which everything shows: large matrices, noisy norms and biases."""

from __future__ import annotations

import torch
from torch import Tensor, nn

GAIN = 1.5
"""Size of a matrix's results for inputs of size 1."""

NOISE = 0.2
"""What is added to vectors, such as norms and biases."""


@torch.no_grad()
def draw_weights(model: nn.Module, seed: int = 0) -> None:
    """Draw all weights of a model anew, in place; a vector keeps the host's value, with noise."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    embeddings -= {id(getattr(model.get_output_embeddings(), "weight", None))}  # if it is tied
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if id(parameter) in embeddings:
            drawn = noise
        elif parameter.dim() > 1:
            drawn = noise * GAIN / _fan_in(parameter) ** 0.5
        else:
            drawn = torch.nan_to_num(parameter.double()) + NOISE * noise
        parameter.copy_(drawn)


def _fan_in(weight: Tensor) -> int:
    """Return how many inputs add up to a result; a stack of matrices has its inputs last."""
    return weight[0].numel() if weight.dim() > 3 else weight.shape[-1]
