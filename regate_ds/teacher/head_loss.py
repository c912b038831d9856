"""The loss of labels under a language model's head, without all logits at once.

Logits exist for one block of positions and ids at a time. A head may be cut over the ranks of a
replica, each of which holds the rows of some ids.

Shapes: N label positions, C positions of a block, V ids on this rank, W ids of a block, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regate_ds.algorithm.loss import UNCHANGED, LogitChange
from regate_ds.parallel.collectives import max_tensor, sum_tensor
from regate_ds.parallel.layout import ProcessGroup

POSITIONS = 2048
"""Number of positions of a block: many, because each block reads all of the head's rows again."""

IDS = 4096
"""Number of ids of a block."""


class HeadPart(nn.Module):
    """The rows of a head from ``first_id`` on; the ranks of ``group`` hold the others, if any."""

    def __init__(
        self,
        project: nn.Linear,
        first_id: int = 0,
        group: ProcessGroup | None = None,
        change: LogitChange = UNCHANGED,
    ) -> None:
        """change: what the model does to its logits; each logit's depends on itself alone."""
        super().__init__()
        self.project = project
        self.first_id = first_id
        self.group = group
        self.change = change

    def losses(self, hidden_NH: Tensor, labels_N: Tensor, num_ids: int = IDS) -> Tensor:
        """Return each label's -log softmax over all ids: fp32 [N].

        num_ids: number of ids of a block. All ranks of the group make this call, with the same
        positions.
        """
        losses = [hidden_NH.new_empty(0, dtype=torch.float32)]
        for hidden_CH, labels_C in zip(hidden_NH.split(POSITIONS), labels_N.split(POSITIONS)):
            log_sum_C, target_C = self._local_sums(hidden_CH, labels_C - self.first_id, num_ids)
            losses.append(_over_ranks(log_sum_C, target_C, self.group))
        return torch.cat(losses)

    def _local_sums(self, hidden_CH: Tensor, row_C: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
        """Return, over this rank's ids, the log of the sum of exp, and the label's logit (0 if the
        label is on another rank)."""
        weight_VH, bias_V = self.project.weight, self.project.bias
        log_sums, targets = [], []
        for start in range(0, weight_VH.shape[0], num_ids):
            ids = slice(start, start + num_ids)
            bias_W = None if bias_V is None else bias_V[ids]
            # The logits get no name here: a name would keep them alive during the next block.
            log_sum_C, target_C = _block_sums(
                self.change.apply(F.linear(hidden_CH, weight_VH[ids], bias_W).float()),
                row_C - start,
            )
            log_sums.append(log_sum_C)
            targets.append(target_C)
        return torch.stack(log_sums).logsumexp(dim=0), torch.stack(targets).sum(dim=0)


def _block_sums(logits_CW: Tensor, row_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same for one block; the logits are overwritten."""
    is_here_C = (row_C >= 0) & (row_C < logits_CW.shape[1])
    target_C = logits_CW.gather(1, row_C.where(is_here_C, 0)[:, None])[:, 0].where(is_here_C, 0.0)
    top_C = logits_CW.amax(dim=1)
    logits_CW -= top_C[:, None]
    return top_C + logits_CW.exp_().sum(dim=1).log(), target_C


def _over_ranks(log_sum_C: Tensor, target_C: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the losses [C] from the sums of all ranks."""
    top_C = max_tensor(log_sum_C.clone(), group)
    parts = torch.stack([(log_sum_C - top_C).exp(), target_C])
    total_C, target_C = sum_tensor(parts, group)
    return top_C + total_C.log() - target_C
