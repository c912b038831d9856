"""The host's attention mask without elided keys, whatever form the host gave it.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

CROSS = re.compile("cross|encoder_att")
"""Names of attention to another model's tokens."""


def without_elided(
    mask: Tensor | None, kept_BT: Tensor, layer: nn.Module, implementation: str, like: Tensor
) -> Tensor:
    """Return [B, 1 or heads, T, T]: the host's mask, in which only kept positions are keys.

    What an elided position reads does not matter, as its result is thrown away; it sees itself, so
    that its softmax has a term.
    """
    kept_key, elided_query = kept_BT[:, None, None, :], ~kept_BT[:, None, :, None]
    itself = torch.eye(kept_BT.shape[1], dtype=torch.bool) & elided_query
    if mask is None or mask.dim() == 2:
        allowed = _of_no_mask(mask, kept_BT, layer, implementation)
        mask = allowed if implementation == "sdpa" else _additive(allowed, like.dtype)
    if mask.dtype == torch.bool:
        return (mask & kept_key) | itself
    lowest = torch.finfo(mask.dtype).min
    return mask.masked_fill(~kept_key, lowest).masked_fill(itself, 0.0)


def _of_no_mask(
    mask: Tensor | None, kept_BT: Tensor, layer: nn.Module, implementation: str
) -> Tensor:
    """Return what attention allows without a 4D mask: sdpa is then causal where its module is."""
    inner = [m for name, m in layer.named_modules() if not CROSS.search(name)]
    flags = [m.is_causal for m in inner if hasattr(m, "is_causal")]
    allowed = torch.ones(len(kept_BT), 1, *2 * kept_BT.shape[1:], dtype=torch.bool)
    if implementation == "sdpa" and all(flags):
        allowed = allowed.tril()
    return allowed if mask is None else allowed & mask.bool()[:, None, None, :]


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    zeros = torch.zeros(allowed.shape, dtype=dtype)
    return zeros.masked_fill(~allowed, torch.finfo(dtype).min)
