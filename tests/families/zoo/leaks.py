"""Whether a host itself lets packed samples see each other.

In such a host, layers that see every token and layers that see kept ones would disagree; the
adapter must refuse its packed rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from regate_ds.algorithm.batch import TokenBatch
from tests.families.zoo.cases import Case
from tests.families.zoo.oracle import host_loss


@torch.no_grad()
def leak_of(host: nn.Module, packed: Case) -> float:
    """Return how far the host's loss of packed rows is from that of each sample alone."""
    together = float(host_loss(host, packed.inputs, packed.batch))
    alone = sum(
        float(host_loss(host, *_sample(packed, row, sample)))
        for row, keys in enumerate(packed.batch.keys)
        for sample in range(len(keys))
    )
    return abs(together - alone) / alone


def _sample(packed: Case, row: int, sample: int) -> tuple[dict[str, Any], TokenBatch]:
    """Return one sample as a micro-batch of its own, with its positions from 0."""
    position_S = (packed.batch.segment_BT[row] == sample).nonzero().squeeze(1)
    inputs = {
        name: value[..., row : row + 1, :].index_select(-1, position_S)
        for name, value in packed.inputs.items()
    }
    labels = packed.batch.labels_BT[row : row + 1, position_S]
    return inputs, TokenBatch(((("set", 0),),), torch.zeros_like(labels), labels)
