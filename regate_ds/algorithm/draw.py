"""Random draws that depend on what they are for alone: not on the rank, nor on what came before."""

from __future__ import annotations

import hashlib

import torch

from regate_ds.algorithm.batch import SampleKey


def generator(
    seed: int, step: int, key: SampleKey, image: int | None = None, *, layer: int | None = None
) -> torch.Generator:
    """Return the generator of one sample's draw in one step, or of one image's or one layer's."""
    name, record = key
    place = "" if image is None else f" image {image}"
    place += "" if layer is None else f" layer {layer}"
    text = f"{seed} {step} {record}{place} {name}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
