"""Whether a host itself keeps packed samples apart.

Where it does not, layers that see every token and layers that see kept ones would disagree; the
adapter must refuse its packed rows.

Shapes: B rows, T positions, S samples, M positions of the longest sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from regate_ds.algorithm.batch import IGNORE, TokenBatch
from tests.families.zoo.cases import Case
from tests.families.zoo.models.sizes import PADDING
from tests.families.zoo.oracle import host_loss


@torch.no_grad()
def leak_of(host: nn.Module, packed: Case, *, masked: bool = True) -> float:
    """Return how far the host's loss of packed rows is from that of a row for each sample.

    masked: whether the host may be given a mask of padding.
    """
    together = float(host_loss(host, packed.inputs, packed.batch))
    inputs, batch = _in_rows_apart(packed)
    if masked:
        inputs["attention_mask"] = (batch.segment_BT >= 0).long()
    alone = float(host_loss(host, inputs, batch))
    return abs(together - alone) / alone


def _in_rows_apart(packed: Case) -> tuple[dict[str, Any], TokenBatch]:
    """Return each sample in a row of its own. Images stay as they are: in reading order."""
    batch = packed.batch
    places = [
        (row, (batch.segment_BT[row] == sample).nonzero().squeeze(1))
        for row, keys in enumerate(batch.keys)
        for sample in range(len(keys))
    ]
    inputs = {
        name: _apart(value, places, PADDING if name == "input_ids" else 0)
        if value.shape[-2:] == batch.labels_BT.shape
        else value
        for name, value in packed.inputs.items()
    }
    labels_SM = _apart(batch.labels_BT, places, IGNORE)
    segment_SM = _apart(torch.zeros_like(batch.segment_BT), places, -1)
    keys = tuple((("set", number),) for number in range(len(places)))
    return inputs, TokenBatch(keys, segment_SM, labels_SM)


def _apart(value: Tensor, places: list[tuple[int, Tensor]], padding: int) -> Tensor:
    """Give each sample a row: [..., B, T] -> [..., S, M]."""
    samples = [value[..., row, :].index_select(-1, position_M) for row, position_M in places]
    padded_SM = pad_sequence([one.movedim(-1, 0) for one in samples], True, padding)
    return padded_SM.movedim(1, -1).movedim(0, -2)
