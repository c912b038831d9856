"""What GPUs can do, by their makers' data sheets: without sparsity, dense products."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU, with the links to the others."""

    bf16: float
    """FLOPs of products a second."""

    fp32: float
    memory: float
    """Bytes."""

    link: float
    """Bytes a second to another GPU of its node, one way."""


NETWORK = 50e9
"""Bytes a second of one GPU to another node: 400 Gbit/s."""

PER_NODE = 8

GPUS = {
    "a100": Gpu(312e12, 19.5e12, 80e9, 300e9),
    "h100": Gpu(989e12, 67e12, 80e9, 450e9),
    "h200": Gpu(989e12, 67e12, 141e9, 450e9),
    "b200": Gpu(2250e12, 75e12, 180e9, 900e9),
    "l40s": Gpu(362e12, 91e12, 48e9, 32e9),
}
