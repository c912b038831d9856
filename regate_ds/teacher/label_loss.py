"""The loss of labels under a language model's head, without all logits at once.

A head may be cut by its vocabulary over the ranks of a replica: each holds the rows of some ids.

Shapes: N label positions, C of one chunk, V rows of this rank's part of the head, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regate_ds.parallel.layout import ProcessGroup
from regate_ds.parallel.sync import max_tensor, sum_tensor

Project = Callable[[Tensor], Tensor]
"""Logits [C, V] of hidden states [C, H]; the result is the caller's to change."""


class HeadPart(nn.Module):
    """Rows ``first_id`` and following of a head whose other rows are on the ranks of ``group``."""

    def __init__(self, weight_VH: nn.Parameter, first_id: int, group: ProcessGroup | None) -> None:
        super().__init__()
        self.weight = weight_VH
        self.first_id = first_id
        self.group = group

    def losses(self, hidden_NH: Tensor, labels_N: Tensor, chunk: int) -> Tensor:
        """As ``label_losses``. All ranks of the group call it, with the same positions."""
        return label_losses(
            lambda hidden_CH: F.linear(hidden_CH, self.weight),
            hidden_NH,
            labels_N,
            chunk=chunk,
            first_id=self.first_id,
            group=self.group,
        )


def label_losses(
    project: Project,
    hidden_NH: Tensor,
    labels_N: Tensor,
    *,
    chunk: int,
    first_id: int = 0,
    group: ProcessGroup | None = None,
) -> Tensor:
    """-log softmax over all ids, at the label: fp32 [N], ``chunk`` positions at a time.

    ``project`` gives the logits of the ids from ``first_id`` on; ``group`` has those of all others.
    """
    losses = [hidden_NH.new_empty(0, dtype=torch.float32)]
    for hidden_CH, labels_C in zip(hidden_NH.split(chunk), labels_N.split(chunk)):
        logits_CV = project(hidden_CH).float()
        losses.append(_losses(logits_CV, labels_C - first_id, group))
    return torch.cat(losses)


def _losses(logits_CV: Tensor, row_C: Tensor, group: ProcessGroup | None) -> Tensor:
    """In place: a chunk's logits are the largest tensor of the whole teacher."""
    logits_CV -= max_tensor(logits_CV.amax(dim=1), group)[:, None]
    is_here_C = (row_C >= 0) & (row_C < logits_CV.shape[1])
    row_C = row_C.where(is_here_C, 0)
    target_C = logits_CV.gather(1, row_C[:, None])[:, 0].where(is_here_C, 0.0)
    target_C, total_C = sum_tensor(torch.stack([target_C, logits_CV.exp_().sum(dim=1)]), group)
    return total_C.log() - target_C
