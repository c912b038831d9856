"""Hashes that tell one sample from another, over its key, its tokens and its labels.

Shapes: S positions of one sample, N label positions of it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from regate_ds.algorithm.batch import SampleKey

_PLACEHOLDER = -1
"""Token id of every image position in the digests."""

NUM_WORDS = 2
"""Number of int64 words of a sample's digest."""


class IndexedSample(Protocol):
    """What the index needs to know of a sample, such as an ``EncodedSample``."""

    @property
    def key(self) -> SampleKey: ...

    @property
    def input_ids_S(self) -> Tensor: ...

    @property
    def labels_S(self) -> Tensor:
        """int64, one per position: the token at t+1 where it belongs to an answer, else IGNORE."""
        ...

    @property
    def is_placeholder_S(self) -> Tensor: ...


def hash_labels(label_ids_N: Tensor) -> int:
    """Return a signed 64-bit hash over the label token ids of one sample, in order."""
    digest = hashlib.blake2b(_bytes_of(label_ids_N.numpy(force=True)), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def digest_of(sample: IndexedSample) -> bytes:
    """Hash a sample's key, tokens and labels, with their lengths, so that no two look alike."""
    name, number = sample.key
    encoded = name.encode()
    # The teacher reads text only: the id that a student has for images must not change the hash.
    is_placeholder_S = sample.is_placeholder_S.numpy(force=True)
    ids_S = np.where(is_placeholder_S, _PLACEHOLDER, sample.input_ids_S.numpy(force=True))
    header = struct.pack("<3q", len(encoded), number, len(ids_S))
    content = header + encoded + _bytes_of(ids_S) + _bytes_of(sample.labels_S.numpy(force=True))
    return hashlib.blake2b(content, digest_size=8 * NUM_WORDS).digest()


def as_words(digests: Sequence[bytes]) -> Tensor:
    """Return digests as int64 [S, 2]."""
    words = np.frombuffer(b"".join(digests), dtype="<i8").astype(np.int64)
    return torch.from_numpy(words).view(-1, NUM_WORDS)


def _bytes_of(ids: np.ndarray) -> bytes:
    return ids.astype("<i8", copy=False).tobytes()
