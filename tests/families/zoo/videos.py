"""Micro-batches of images, of videos and of both, for families that take both.

A video here has one temporal step, and so is one image of the method.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.families.zoo.cases import Case, cases_of, joined, row_of, tokens_of_features
from tests.families.zoo.models.family import Family
from tests.families.zoo.models.sizes import VIDEO_TOKEN

IMAGE, VIDEO = "image", "video"

MIXES = (
    ((IMAGE, VIDEO), (IMAGE,)),
    ((IMAGE, VIDEO), ()),
    ((IMAGE,), (VIDEO,)),
    ((), ()),
    ((), (VIDEO,)),
    ((VIDEO,), (IMAGE, VIDEO)),
)
"""What each of two ranks sees, in each micro-batch of a step."""

_NAMES_OF_VIDEOS = {
    "pixel_values": "pixel_values_videos",
    "image_grid_thw": "video_grid_thw",
    "image_merge_sizes": "video_merge_sizes",
}


def mixed_case(family: Family, host: Any, kinds: tuple[str, ...], seed: int) -> Case:
    """Return a micro-batch whose first row has one of each kind, and the third one of the last."""
    generator = torch.Generator().manual_seed(seed)
    if not kinds:
        return next(case for case in cases_of(family, host) if case.name == "text")
    rows_of_kinds = [kinds, (), kinds[-1:]]
    flat = [kind for row in rows_of_kinds for kind in row]
    made, sizes = {}, {}
    for kind in kinds:
        inputs, sizes[kind] = _MAKERS[kind](family, host, generator, flat.count(kind))
        made |= inputs
    remaining = {kind: iter(found) for kind, found in sizes.items()}
    lengths = [[next(remaining[kind]) for kind in row] for row in rows_of_kinds]
    answers = [family.settings.get("answers", (7, 6)), (9, 8), (6, 4)]
    rows = [row_of([length], [answer], generator) for length, answer in zip(lengths, answers)]
    inputs, batch = joined(family, rows)
    is_video_BT = _is_video(batch.image_BT, rows_of_kinds)
    if not _shares_token(family):
        inputs["input_ids"] = inputs["input_ids"].masked_fill(is_video_BT, VIDEO_TOKEN)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"].masked_fill(is_video_BT, 2)
    if not family.settings.get("mask_never", False):
        inputs["attention_mask"] = (batch.segment_BT >= 0).long()
    return Case("+".join(kinds), {**inputs, **made}, batch)


def _is_video(image_BT: Tensor | None, kinds: list[tuple[str, ...]]) -> Tensor:
    assert image_BT is not None
    rows = [torch.tensor([*(kind == VIDEO for kind in row), False]) for row in kinds]
    # The last entry is that of -1, where no image is.
    return torch.stack([row[numbers_T] for row, numbers_T in zip(rows, image_BT)])


def _images(family: Family, host: Any, generator: torch.Generator, count: int) -> Any:
    assert family.make_images is not None
    made = family.make_images(host, generator, count)
    return made, (family.count_tokens or tokens_of_features)(host, made)


def _videos(family: Family, host: Any, generator: torch.Generator, count: int) -> Any:
    """Make videos as images of any size, or as clips of one picture."""
    assert family.make_images is not None
    made = family.make_images(host, generator, count)
    if "image_grid_thw" in made:
        videos = {_NAMES_OF_VIDEOS[name]: x for name, x in made.items()}
    else:
        side = host.config.vision_config.image_size
        videos = {"pixel_values_videos": torch.randn(count, 2, 3, side, side, generator=generator)}
    return videos, _tokens(host, videos, count)


@torch.no_grad()
def _tokens(host: Any, videos: dict[str, Any], count: int) -> list[int]:
    features = host.model.get_video_features(**videos, return_dict=True).pooler_output
    if isinstance(features, list | tuple):
        return [len(one) for one in features]
    return [features.shape[:-1].numel() // count] * count


_MAKERS = {IMAGE: _images, VIDEO: _videos}


def mixes_of(family: Family) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """Return the mixes that the class takes; none if it takes no videos."""
    forward = getattr(transformers, family.model_class).forward
    if "pixel_values_videos" not in signature(forward).parameters:
        return ()
    return tuple(mix for mix in MIXES if not (_shares_token(family) and (IMAGE, VIDEO) in mix))


def _shares_token(family: Family) -> bool:
    """GLM's videos have placeholders of images: it takes both only in different micro-batches."""
    return family.name.startswith("glm")
