"""The loss of labels under a language model's head, without all logits at once.

A head may be cut by its vocabulary over the ranks of a replica: each holds the rows of some ids.

Shapes: N label positions, C of one chunk, V rows of this rank's part of the head, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regate_ds.parallel.layout import ProcessGroup
from regate_ds.parallel.sync import max_tensor, sum_tensor


class HeadPart(nn.Module):
    """The head's rows from ``first_id`` on, whose others are on the ranks of ``group``; or all."""

    def __init__(
        self, project: nn.Module, first_id: int = 0, group: ProcessGroup | None = None
    ) -> None:
        """``project`` makes logits [C, V] of hidden states [C, H]."""
        super().__init__()
        self.project = project
        self.first_id = first_id
        self.group = group

    def losses(self, hidden_NH: Tensor, labels_N: Tensor, chunk: int) -> Tensor:
        """-log softmax over all ids, at the label: fp32 [N], ``chunk`` positions at a time.

        All ranks of the group call it, with the same positions.
        """
        losses = [hidden_NH.new_empty(0, dtype=torch.float32)]
        for hidden_CH, labels_C in zip(hidden_NH.split(chunk), labels_N.split(chunk)):
            logits_CV = self.project(hidden_CH).float()
            losses.append(_losses(logits_CV, labels_C - self.first_id, self.group))
        return torch.cat(losses)


def _losses(logits_CV: Tensor, row_C: Tensor, group: ProcessGroup | None) -> Tensor:
    """In place: a chunk's logits are the largest tensor of the whole teacher."""
    logits_CV -= max_tensor(logits_CV.amax(dim=1), group)[:, None]
    is_here_C = (row_C >= 0) & (row_C < logits_CV.shape[1])
    row_C = row_C.where(is_here_C, 0)
    target_C = logits_CV.gather(1, row_C[:, None])[:, 0].where(is_here_C, 0.0)
    target_C, total_C = sum_tensor(torch.stack([target_C, logits_CV.exp_().sum(dim=1)]), group)
    return total_C.log() - target_C
