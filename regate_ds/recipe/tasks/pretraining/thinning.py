"""Leave most image tokens out of a batch: in pretraining a quarter of them says nearly all.

Every token keeps the position that it has in the whole sample.

Shapes: B samples, T positions, K kept positions.
"""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor


def thin_image(is_image_BT: Tensor, share: float, rng: Random) -> Tensor:
    """Draw which positions stay: all but image tokens, and a ``share`` of those: [B, K] in order.

    Every row has as many image tokens as the others.
    """
    num_image = int(is_image_BT[0].sum())
    num_kept = is_image_BT.shape[1] - num_image + round(share * num_image)
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    draw_BT = torch.rand(is_image_BT.shape, generator=generator).masked_fill(~is_image_BT, 2.0)
    return draw_BT.topk(num_kept, dim=1).indices.sort(dim=1).values
