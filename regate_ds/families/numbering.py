"""Number the images of a user's micro-batch, from its placeholders and the model's other inputs.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regate_ds.algorithm.batch import join_images, number_images, number_runs
from regate_ds.data.keyed import IMAGES, NumberImages
from regate_ds.families.family import ImageLengths
from regate_ds.families.table import find_family


def numbering_of(model: Any, *, elides_images: bool) -> NumberImages:
    """Return what numbers the images of this model's micro-batches.

    elides_images: whether the run elides image tokens. Otherwise a run of placeholders counts as an
        image, because then only the places of images matter.
    """
    config = getattr(model, "config", None)
    if not elides_images:
        names = ("image_token_id", "video_token_id")
        found = [getattr(config, name, None) for name in names]
        return partial(_number_runs, tuple(one for one in found if one is not None))
    family = find_family(model)
    if family is None or family.image_lengths is None:
        return partial(_refuse, getattr(config, "model_type", type(model).__name__))
    return partial(_number_images, family.image_lengths, config)


def _number_runs(token_ids: tuple[int, ...], inputs: Mapping[str, Any]) -> Tensor | None:
    """Number the runs of placeholders; None if the inputs do not show where they are."""
    ids_BT = inputs.get("input_ids")
    if not token_ids or not isinstance(ids_BT, Tensor) or ids_BT.shape != inputs["labels"].shape:
        return None
    return number_runs(torch.isin(ids_BT, torch.tensor(token_ids, device=ids_BT.device)))


def _number_images(
    image_lengths: ImageLengths, config: Any, inputs: Mapping[str, Any]
) -> Tensor | None:
    """Number the images by their lengths; ValueError if these do not fit the placeholders."""
    ids_BT = inputs.get("input_ids")
    if not isinstance(ids_BT, Tensor):
        return None
    ids_BT = ids_BT.cpu()
    lengths = image_lengths(config, inputs)
    return join_images([number_images(ids_BT == token, each) for token, each in lengths.items()])


def _refuse(model_type: str, inputs: Mapping[str, Any]) -> Tensor | None:
    raise ValueError(
        f"images.keep_share is below 1, but how many tokens each image of a {model_type!r} model "
        f"has is not known; let the collate function return {IMAGES!r} [rows, tokens], the number "
        "of the image in its sample and -1 elsewhere, or set images.keep_share=1.0"
    )
