"""The entropy of a Megatron-core model's distributions, taken where its loss gets the logits.

Each tensor rank has the logits of a part of the vocabulary: the ranks exchange two numbers for each
position. Logits go through in chunks, so that nothing in fp32 is as large as all of them.

Shapes: P rows that have a target on this context rank, with padding; V this rank's vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from regate_ds.adapters.attachment import Attachment
from regate_ds.algorithm.entropy import entropy_of, joined_entropy
from regate_ds.algorithm.loss import CHUNK
from regate_ds.parallel.collectives import gather_values


class EntropyTap:
    """Takes the entropies of the forward passes that it is opened for."""

    def __init__(self, gpt: nn.Module, attachment: Attachment) -> None:
        """Wrap the chunk's ``compute_language_model_loss``; the chunk must have the head."""
        group = mpu.get_tensor_model_parallel_group()
        self._group = group if dist.get_world_size(group) > 1 else None
        self._is_open, self._entropy_P = False, None
        attachment.rebind(gpt, "compute_language_model_loss", _loss, tap=self)

    def open(self) -> None:
        """Take the entropies of the forward pass that comes next."""
        self._is_open, self._entropy_P = True, None

    def close(self) -> Tensor | None:
        """Return the entropies [P] taken since ``open``; None if the model computed no loss."""
        taken_P, self._is_open, self._entropy_P = self._entropy_P, False, None
        return taken_P

    def look(self, logits: Tensor) -> None:
        if self._is_open:
            logits_PV = logits.detach().flatten(0, 1)
            self._entropy_P = vocabulary_entropy(logits_PV, self._group)


def _loss(host_loss: Any, labels: Tensor, logits: Tensor, *, tap: EntropyTap) -> Tensor:
    # Before the host's loss, which works in place on logits in fp32.
    tap.look(logits)
    return host_loss(labels, logits)


def vocabulary_entropy(logits_PV: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the entropy [P], fp32, over the vocabulary that the ranks of the group hold together.

    Collective over the group.
    """
    own_2P = torch.cat([_alone(chunk.float()) for chunk in logits_PV.split(CHUNK)], dim=1)
    size = 1 if group is None else dist.get_world_size(group)
    parts = gather_values(own_2P.flatten(), [own_2P.numel()] * size, group)
    return joined_entropy(*torch.stack(parts).view(size, *own_2P.shape).unbind(1))


def _alone(logits_CV: Tensor) -> Tensor:
    """Return [2, C]: the logarithm of the sum of this part's exponentials, and its entropy."""
    return torch.stack([logits_CV.logsumexp(dim=1), entropy_of(logits_CV)])
