"""The loss of a merged micro-batch by the per-layer oracle, one sample and one target at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regate_ds.algorithm.batch import IGNORE, TokenBatch
from tests.support.oracle import Sample, sample_loss
from tests.support.patches import plain_samples


def merged_loss(host: nn.Module, embedded_BTH: Tensor, batch: TokenBatch, size: int) -> Tensor:
    """Sum over all targets of the loss by the patch before them."""
    labels = batch.labels_BT.flatten().tolist()
    x_PH = embedded_BTH.flatten(0, 1)
    total = embedded_BTH.new_zeros(())
    for _, patches, targets in plain_samples(batch, size):
        means = torch.stack([sum(x_PH[p] for p in members) / len(members) for members in patches])
        with_label = [(number, labels[p]) for number, p in targets if labels[p] != IGNORE]
        # The oracle takes one target a position, so each pass asks for another one of each patch.
        while with_label:
            asked = dict(reversed(with_label))
            for pair in asked.items():
                with_label.remove(pair)
            sample = Sample(means, list(range(len(means))), asked)
            total = total + sample_loss(host, sample, range(0))
    return total
