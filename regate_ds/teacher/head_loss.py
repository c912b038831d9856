"""The loss of labels under a language model's head, without all logits at once.

Logits exist for a block of positions and ids at a time. A head may be cut by its ids over the ranks
of a replica, each of which holds the rows of some of them.

Shapes: N label positions, C of one block, W ids of one block, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regate_ds.parallel.collectives import max_tensor, sum_tensor
from regate_ds.parallel.layout import ProcessGroup

POSITIONS = 2048
"""Positions of one block: many, because a matrix product prepares the head's rows once a block."""

IDS = 4096
"""Ids of one block."""


class HeadPart(nn.Module):
    """The head's rows from ``first_id`` on, whose others are on the ranks of ``group``; or all."""

    def __init__(
        self, project: nn.Linear, first_id: int = 0, group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.project = project
        self.first_id = first_id
        self.group = group

    def losses(self, hidden_NH: Tensor, labels_N: Tensor, num_ids: int = IDS) -> Tensor:
        """-log softmax over all ids, at the label: fp32 [N]; ``num_ids`` at a time.

        All ranks of the group call it, with the same positions.
        """
        losses = [hidden_NH.new_empty(0, dtype=torch.float32)]
        for hidden_CH, labels_C in zip(hidden_NH.split(POSITIONS), labels_N.split(POSITIONS)):
            log_sum_C, target_C = self._own(hidden_CH, labels_C - self.first_id, num_ids)
            losses.append(_over_ranks(log_sum_C, target_C, self.group))
        return torch.cat(losses)

    def _own(self, hidden_CH: Tensor, row_C: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
        """Of this rank's ids: the logarithm of the sum of exp, and the label's logit if it is here,
        else 0."""
        weight_VH, bias_V = self.project.weight, self.project.bias
        log_sums, targets = [], []
        for start in range(0, weight_VH.shape[0], num_ids):
            ids = slice(start, start + num_ids)
            bias_W = None if bias_V is None else bias_V[ids]
            # No name for the logits here: they would live on beside the next block's.
            log_sum_C, target_C = _of_block(
                F.linear(hidden_CH, weight_VH[ids], bias_W).float(), row_C - start
            )
            log_sums.append(log_sum_C)
            targets.append(target_C)
        return torch.stack(log_sums).logsumexp(dim=0), torch.stack(targets).sum(dim=0)


def _of_block(logits_CW: Tensor, row_C: Tensor) -> tuple[Tensor, Tensor]:
    """The same of one block, whose logits are used up."""
    is_here_C = (row_C >= 0) & (row_C < logits_CW.shape[1])
    target_C = logits_CW.gather(1, row_C.where(is_here_C, 0)[:, None])[:, 0].where(is_here_C, 0.0)
    top_C = logits_CW.amax(dim=1)
    logits_CW -= top_C[:, None]
    return top_C + logits_CW.exp_().sum(dim=1).log(), target_C


def _over_ranks(log_sum_C: Tensor, target_C: Tensor, group: ProcessGroup | None) -> Tensor:
    top_C = max_tensor(log_sum_C.clone(), group)
    parts = torch.stack([(log_sum_C - top_C).exp(), target_C])
    total_C, target_C = sum_tensor(parts, group)
    return top_C + total_C.log() - target_C
