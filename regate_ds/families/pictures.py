"""What rankings read of pictures: pixels, features and attention of each of their tokens.

Shapes: n tokens of an image, P values of a patch, F features of a token, L layers of the tower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.algorithm.rankings.ranking import Picture, Reads
from regate_ds.families.attention import measuring_attention
from regate_ds.families.table import family_of


@torch.no_grad()
def pictures_of(
    model: Any, inputs: dict[str, Tensor], sizes: Sequence[int], reads: Reads
) -> list[Picture]:
    """Return what a ranking reads of each picture.

    inputs: the model inputs of the pictures alone, such as ``pixel_values``.
    sizes: the number of tokens of each picture.

    For pixels the model is asked for its configuration only. ValueError if the tower gives a
    picture another number of tokens.
    """
    family, lengths = family_of(model), list(sizes)
    if reads == "pixels":
        if family.patches is None:
            raise _unranked(family.model_type, "pixels")
        pixels = family.patches(model.config, inputs, lengths)
        _require_sizes(family.model_type, pixels, lengths)
        return [Picture(pixels_nP=pixels_nP.float()) for pixels_nP in pixels]
    like = next(family.tower_of(model).parameters())
    on_device = {name: tensor.to(like.device) for name, tensor in inputs.items()}
    with _evaluating(model):
        if reads == "features":
            features = list(model.get_image_features(**on_device).pooler_output)
            _require_sizes(family.model_type, features, lengths)
            return [
                Picture(features_nF=_finite(features_nF.float(), "features"))
                for features_nF in features
            ]
        if family.attention is None:
            raise _unranked(family.model_type, "attention")
        with measuring_attention(family.tower_of(model)) as received:
            model.get_image_features(**on_device)
    attention = family.attention(model.config, on_device, received.layers_LBS)
    _require_sizes(family.model_type, [one.T for one in attention], lengths)
    return [Picture(attention_Ln=_finite(one_Ln, "attention")) for one_Ln in attention]


def _unranked(model_type: str, what: str) -> ValueError:
    return ValueError(
        f"images of a {model_type} model cannot be ranked by {what}: how its tower lays them out "
        "is not known; use images.ranking=random, stride or diversity"
    )


def _finite(values: Tensor, what: str) -> Tensor:
    """Return the values; RuntimeError if one of them is not finite."""
    if not bool(values.isfinite().all()):
        raise RuntimeError(
            f"the tower's {what} of an image are not finite; check the model's weights, or run it "
            "in bf16 or fp32"
        )
    return values


def _require_sizes(model_type: str, found: Sequence[Tensor], sizes: list[int]) -> None:
    if (lengths := [len(one) for one in found]) != sizes:
        raise ValueError(
            f"the {model_type} model's tower makes {lengths} tokens of images that have {sizes} "
            "placeholders; use images.ranking=random or stride, which read no store"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block without dropout, and leave each module in the mode that it was in."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True
