"""Entropy of the distribution that logits stand for, in nats and without gradient.

Shapes: C positions of one chunk, L positions, V vocabulary, R parts of the vocabulary.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import torch
from torch import Tensor


def entropy_of(logits_CV: Tensor) -> Tensor:
    """Return the entropy [C] of each row's softmax, by one more tensor of the logits' size."""
    share_CV = logits_CV.detach().softmax(dim=1)
    return torch.special.entr(share_CV, out=share_CV).sum(dim=1)


def joined_entropy(normaliser_RL: Tensor, entropy_RL: Tensor) -> Tensor:
    """Return the entropy [L] of softmaxes whose vocabulary lies in R parts.

    normaliser_RL: logarithm of the sum of each part's exponentials.
    entropy_RL: entropy of the softmax of each part alone.

    A part has the probability w, a softmax of the normalisers; the whole is sum w (entropy - ln w).
    """
    share_RL = normaliser_RL.softmax(dim=0)
    return (share_RL * entropy_RL + torch.special.entr(share_RL)).sum(dim=0)
