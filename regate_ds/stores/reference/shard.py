"""One shard file of a reference store: little-endian fp16 values, then a checksum.

The checksum covers ``Shard.samples`` and then the values. So a file of other samples or of another
teacher is refused, even if it has the same size and values.

Values are negative log-likelihoods in nats, or differences of two (``Manifest.column``). The
relative error of fp16 is at most 2**-11 from 2**-14 up, its absolute error at most 2**-25 below; a
value beyond 65504 is refused. Shapes: N label positions of the shard's samples, R rows of the
index.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from regate_ds.stores.kind import hash_of
from regate_ds.stores.reference.manifest import REFERENCE, Shard, shard_path
from regate_ds.stores.shard_file import ShardFile

LARGEST = 65504.0
"""Largest finite fp16 number, in nats."""

VALUE = np.dtype("<f2")


def describe_samples(teacher_id: str, tokens_per_batch: int, digests_R2: Tensor) -> str:
    """Hash what a shard's values depend on; the result is ``Shard.samples``."""
    header = f"{teacher_id}\n{tokens_per_batch}\n".encode()
    return hash_of(header, digests_R2.numpy().astype("<i8").tobytes())


def shard_files(store: Path, shards: Sequence[Shard]) -> list[ShardFile]:
    """Return the file of each shard of a store."""
    return [
        ShardFile(
            REFERENCE,
            shard_path(store, number),
            shard.num_values * VALUE.itemsize,
            shard.samples,
            shard.sha256,
        )
        for number, shard in enumerate(shards)
    ]


def rounded(values_N: Tensor) -> bytes:
    """Return the values in fp16, as a shard file has them."""
    return values_N.detach().cpu().numpy().astype(VALUE).tobytes()
