"""Features of the image that a decoder adds to its stream between layers (deepstack).

While the stream holds kept rows only, they are added at kept image tokens: an elided token rides
the stream unchanged. Whether it does is the state of the pass, never read from a shape: where a row
keeps everything, all shapes fit.

Shapes: B rows, T positions, K slots, V image tokens, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regate_ds.adapters.huggingface.layer_inputs import ForwardPass
from regate_ds.algorithm.plan import ElisionPlan

METHOD = "_deepstack_process"
"""Name of the decoder's method that adds the features."""


@dataclass
class CurrentPass:
    """The forward pass that a model is in; the host hands no plan to the method above."""

    value: ForwardPass | None = None


def add_at_kept(
    host_method: Any,
    hidden_states: Tensor,
    visual_pos_masks: Tensor,
    visual_embeds: Tensor,
    *,
    current: CurrentPass,
) -> Any:
    """Add the features [V, H] at the image tokens of the mask [B, T], or at those that are kept."""
    within = current.value
    if within is None or not within.holds_kept_rows:
        return host_method(hidden_states, visual_pos_masks, visual_embeds)
    is_image_BK, number_L = _kept_images(visual_pos_masks, within.plan)
    return host_method(hidden_states, is_image_BK, visual_embeds[number_L])


def _kept_images(is_image_BT: Tensor, plan: ElisionPlan) -> tuple[Tensor, Tensor]:
    """Return which slots [B, K] hold an image token, and the number of each among all V."""
    is_image_BT = is_image_BT.to(plan.kept_BK.device)
    number_BT = is_image_BT.flatten().cumsum(0).view_as(is_image_BT) - 1
    is_image_BK = is_image_BT.gather(1, plan.kept_BK) & (plan.segment_BK >= 0)
    return is_image_BK, torch.masked_select(number_BT.gather(1, plan.kept_BK), is_image_BK)
