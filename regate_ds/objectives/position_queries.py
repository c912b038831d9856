"""Queries, one a position, that read two streams of states outside of the position's span.

Shapes: B rows, T tokens, P patches before them, S = P + T, M = 1 + P + 2 T places that are read,
H width, A heads, D width of a head.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NOTHING, PATCH, RIGHT, LEFT = range(4)
"""What stands at a place that is read; the first is there for queries with nothing else."""


@dataclass(frozen=True)
class Streams:
    """The states of a text that is read in both directions, behind its patches."""

    right_BSH: Tensor
    """Left to right."""

    left_BSH: Tensor
    """Right to left, in the order in which this stream reads."""

    turned_BT: Tensor
    """int64: the position of each token as the right-to-left stream reads them."""

    is_real_BT: Tensor
    """bool: False at padding, which is last in both."""


class PositionQueries(nn.Module):
    """Layers of attention from positions to the states of both streams."""

    def __init__(self, width: int, *, num_layers: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads or width % 2:
            raise ValueError(
                f"query_heads={num_heads}: the main model's width {width} must be even and a "
                "multiple of it; give another number"
            )
        self.kinds = nn.Embedding(4, width)
        self.place = nn.Linear(width, width)
        self.start = nn.Linear(width, width)
        self.layers = nn.ModuleList(_Layer(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, streams: Streams, first_BT: Tensor, last_BT: Tensor) -> Tensor:
        """Return a state for each position [B, T, H] that knows nothing of its span.

        first_BT, last_BT: each position's span, both ends included.
        """
        turned_BT, is_real_BT = streams.turned_BT, streams.is_real_BT
        num_tokens = is_real_BT.shape[1]
        read_BMH = self._read(streams)
        place_T = torch.arange(num_tokens, device=is_real_BT.device)
        before_BTT = place_T < first_BT[:, :, None]
        behind_BTT = (turned_BT[:, None, :] > last_BT[:, :, None]) & is_real_BT[:, None, :]
        num_free = 1 + streams.right_BSH.shape[1] - num_tokens
        free = before_BTT.new_ones(*before_BTT.shape[:2], num_free)
        may_read_BTM = torch.cat([free, before_BTT, behind_BTT], dim=2)
        waves_TH = waves(place_T, read_BMH.shape[2], read_BMH.dtype)
        state_BTH = self.start(waves_TH).expand(len(read_BMH), -1, -1)
        for layer in self.layers:
            state_BTH = layer(state_BTH, read_BMH, may_read_BTM)
        return self.norm(state_BTH)

    def _read(self, streams: Streams) -> Tensor:
        """Return the places that are read [B, M, H]: nothing, patches, and the two streams."""
        right_BSH, turned_BT = streams.right_BSH, streams.turned_BT
        num_tokens, width = turned_BT.shape[1], right_BSH.shape[2]
        num_patches = right_BSH.shape[1] - num_tokens
        place_T = torch.arange(num_tokens, device=right_BSH.device)
        waves_TH = waves(place_T, width, right_BSH.dtype)
        patches_BPH, right_BTH = right_BSH[:, :num_patches], right_BSH[:, num_patches:]
        kinds = self.kinds.weight
        nothing_B1H = kinds[NOTHING].expand(len(right_BSH), 1, -1)
        return torch.cat(
            [
                nothing_B1H,
                patches_BPH + kinds[PATCH],
                right_BTH + self.place(waves_TH) + kinds[RIGHT],
                streams.left_BSH[:, num_patches:] + self.place(waves_TH[turned_BT]) + kinds[LEFT],
            ],
            dim=1,
        )


class _Layer(nn.Module):
    """Attention to what may be read, then a small network, each added to the state."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm, self.norm_read = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, state_BTH: Tensor, read_BMH: Tensor, may_read_BTM: Tensor) -> Tensor:
        query_BATD = self._heads(self.query(self.norm(state_BTH)))
        key_BMH, value_BMH = self.key_value(self.norm_read(read_BMH)).chunk(2, dim=2)
        found_BATD = F.scaled_dot_product_attention(
            query_BATD,
            self._heads(key_BMH),
            self._heads(value_BMH),
            attn_mask=may_read_BTM[:, None],
        )
        state_BTH = state_BTH + self.out(found_BATD.transpose(1, 2).flatten(2))
        return state_BTH + self.mlp(state_BTH)

    def _heads(self, x_BNH: Tensor) -> Tensor:
        return x_BNH.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def waves(place_T: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return sine and cosine of each place at wavelengths of 2 pi to 10000 times as much (arXiv
    1706.03762), [T, H] with H = width."""
    precise = torch.promote_types(dtype, torch.float32)
    half = torch.arange(width // 2, device=place_T.device, dtype=precise)
    rate = (half * (-math.log(10_000.0) / (width // 2))).exp()
    angle_TD = place_T[:, None] * rate
    return torch.cat([angle_TD.sin(), angle_TD.cos()], dim=1).to(dtype)
