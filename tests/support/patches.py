"""Patches of tokens found by walking over each sample: the plain form of merged steps."""

from __future__ import annotations

from collections.abc import Iterator

from regate_ds.algorithm.batch import IGNORE, TokenBatch

Patches = list[list[int]]
"""The flat positions of each patch of a sample."""


def plain_samples(
    batch: TokenBatch, size: int
) -> Iterator[tuple[int, Patches, list[tuple[int, int]]]]:
    """(row, patches, targets) of each sample; a target is the number of the patch that predicts it
    and the flat position whose label it is, if that has one."""
    num_tokens = batch.labels_BT.shape[1]
    labels = batch.labels_BT.flatten().tolist()
    images = None if batch.image_BT is None else batch.image_BT.flatten().tolist()
    for row, segments in enumerate(batch.segment_BT.tolist()):
        for sample in range(max(segments) + 1):
            positions = [row * num_tokens + t for t in range(num_tokens) if segments[t] == sample]
            kinds = []
            for n, p in enumerate(positions):
                if images is not None and images[p] >= 0:
                    kinds.append(("image", p))
                else:
                    is_answer = n > 0 and labels[positions[n - 1]] != IGNORE
                    kinds.append(("answer" if is_answer else "prompt", -1))
            patches: Patches = []
            for n, p in enumerate(positions):
                if n and kinds[n] == kinds[n - 1] and len(patches[-1]) < size:
                    patches[-1].append(p)
                else:
                    patches.append([p])
            targets = []
            for number, following in enumerate([*patches[1:], [positions[-1] + 1]]):
                targets += [(number, p - 1) for p in following]
            yield row, patches, targets
