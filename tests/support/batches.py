"""Random micro-batches, made without a framework."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from regate_ds.algorithm.batch import IGNORE, TokenBatch

VOCABULARY = 61


def random_batch(rows: list[list[int]], *, seed: int = 0, length: int | None = None):
    """(input_ids_BT, TokenBatch): rows of samples of the given lengths, answers at random.

    Each sample has a prompt of at least two tokens and one or two answer turns.
    """
    rng = random.Random(seed)
    length = length or max(sum(row) for row in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    segment = torch.full((len(rows), length), -1)
    labels = torch.full((len(rows), length), IGNORE)
    keys, number = [], 0
    for r, samples in enumerate(rows):
        start = 0
        for s, size in enumerate(samples):
            ids = [rng.randrange(1, VOCABULARY - 1) for _ in range(size)]
            input_ids[r, start : start + size] = torch.tensor(ids)
            segment[r, start : start + size] = s
            for t in _label_positions(size, rng):
                labels[r, start + t] = ids[t + 1]
            start += size
        keys.append(tuple(("set", number + i) for i in range(len(samples))))
        number += len(samples)
    return input_ids, TokenBatch(tuple(keys), segment, labels)


def made_up_images(batch: TokenBatch) -> TokenBatch:
    """Say that the first half of each sample, but its first position, is two images that touch.

    Label positions among them stay what they are.
    """
    image_BT = torch.full_like(batch.segment_BT, -1)
    for r, row in enumerate(batch.segment_BT.tolist()):
        for s in range(max(row) + 1):
            start, middle = row.index(s), row.count(s) // 2
            image_BT[r, start + 1 : start + middle] = 1
            image_BT[r, start + 1 : start + 1 + middle // 2] = 0
    return replace(batch, image_BT=image_BT)


def _label_positions(size: int, rng: random.Random) -> list[int]:
    if size < 3:
        return []
    begin = rng.randrange(1, max(2, size // 2))
    gap = rng.randrange(begin, size - 1)
    return [t for t in range(begin, size - 1) if t != gap or size < 8]
