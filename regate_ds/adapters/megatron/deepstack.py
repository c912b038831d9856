"""Features of images that a decoder adds to its stream between layers, as Qwen3-VL's does.

Megatron-Bridge's decoder has them at the image tokens of this rank, one set for each of its first
layers. Where the stream holds kept rows, they must be at those: they go the way of the stream's own
rows, so that ranks that share a sequence get theirs. They travel as the decoder's arguments, which
activation recomputation captures.

Shapes: V image tokens of this rank, B rows, S positions of this rank, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.adapters.attachment import Attachment

ADDS = "_deepstack_process"
"""Name of the decoder's method that adds them."""

_FEATURES = "deepstack_visual_embeds"


def rebind_additions(decoder: nn.Module, attachment: Attachment) -> None:
    """Make a decoder that adds features take rows of them, too."""
    if hasattr(decoder, ADDS):
        attachment.rebind(decoder, ADDS, _add)


def num_additions(gpt: Any) -> int:
    """Return how many of the model's first layers are followed by an addition of features."""
    if not hasattr(gpt.decoder, ADDS):
        return 0
    return len(getattr(gpt.config.vision_config, "deepstack_visual_indexes", None) or ())


def moved_features(
    kwargs: dict[str, Any],
    layers: Sequence[int],
    last_full: int,
    move: Callable[[Tensor], Tensor],
) -> dict[str, Any]:
    """Return a decoder's arguments with its features as rows; the same if it has none.

    layers: numbers of the decoder's layers. last_full: the layer behind which the stream begins to
    hold kept rows. move: returns kept rows of full ones.
    """
    features = kwargs.get(_FEATURES)
    if features is None:
        return kwargs
    is_image_BS, shape = kwargs["visual_pos_masks"], kwargs["hidden_states"].shape
    rows = [_as_rows(features_VH, is_image_BS, shape) for features_VH in features]
    is_kept = [layer >= last_full for layer in layers]
    moved = [move(one) if kept else one for one, kept in zip(rows, is_kept, strict=False)]
    return {**kwargs, _FEATURES: moved}


def _as_rows(features_VH: Tensor, is_image_BS: Tensor, shape: torch.Size) -> Tensor:
    """Return the features at their positions [S, B, H], and 0 elsewhere."""
    rows_BSH = features_VH.new_zeros(shape[1], shape[0], shape[2])
    return rows_BSH.index_put((is_image_BS,), features_VH).transpose(0, 1)


def _add(host_add: Any, hidden_SBH: Tensor, is_image_BS: Tensor, features: Tensor) -> Tensor:
    # The host's own features are [V, H].
    return (
        hidden_SBH + features
        if features.dim() == 3
        else host_add(hidden_SBH, is_image_BS, features)
    )
