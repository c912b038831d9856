"""Run the vision tower on an empty image, times zero, for a micro-batch without an image.

This is needed because ranks of one ZeRO group must all reduce the same parameters in the same
order, whether or not their micro-batch has an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.adapters.huggingface.layer_inputs import ForwardPass
from regate_ds.families.table import FAMILIES, find_family

PIXELS = ("pixel_values", "pixel_values_videos", "pixel_values_images")
"""Inputs of a multimodal model that make it run its vision tower."""

_FEATURES = ("pooler_output", "deepstack_features")
"""What of a tower's output enters the decoder. Its other fields may come from weights that a
micro-batch with images does not reach."""

_MARKS = ("mm_token_type_ids",)
"""Inputs that mark image tokens, which a micro-batch without an image does not need."""


def has_tower(model: nn.Module) -> bool:
    """Return whether the model's config describes a vision tower."""
    return getattr(getattr(model, "config", None), "vision_config", None) is not None


def forward_with_tower(
    host_forward: Any,
    *args: Any,
    host: nn.Module,
    regate_plan: ForwardPass | None = None,
    **kwargs: Any,
) -> Any:
    """Add an empty image to a micro-batch that has a plan and no image.

    This happens inside the base model's own call, because under ZeRO-3 all ranks must enter modules
    in one order.
    """
    if regate_plan is None:
        return host_forward(*args, **kwargs)
    _require_one_kind(host, kwargs)
    if all(kwargs.get(name) is None for name in PIXELS):
        kwargs = with_empty_image(host, kwargs)
    return host_forward(*args, **kwargs, regate_plan=regate_plan)


def _require_one_kind(host: nn.Module, inputs: dict[str, Any]) -> None:
    """Refuse images and videos in one micro-batch under ZeRO-3.

    Each kind is a call of the tower, and a rank with one kind makes one call: the ranks would wait
    for each other's weights. ZeRO-3 is known by the numbers that it gives to parameters.
    """
    kinds = [name for name in PIXELS if inputs.get(name) is not None]
    if len(kinds) > 1 and any(hasattr(weight, "ds_id") for weight in host.parameters()):
        raise ValueError(
            f"a micro-batch has {' and '.join(kinds)}: under ZeRO-3 a rank that has one of them "
            "would wait for the others; put them into different micro-batches, or use stage 2"
        )


def with_empty_image(host: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs with ``inputs_embeds`` in place of ``input_ids``.

    The embeddings are those of the text plus zero times the features of an empty image.

    ValueError for a model family whose empty image is not known: each micro-batch then needs an
    image.
    """
    family = find_family(host)
    if family is None:
        raise ValueError(
            f"a micro-batch has no image, which on several ranks needs an empty one, but that of a "
            f"{host.config.model_type} model is not known (only for {tuple(FAMILIES)}); put a "
            "sample with an image into every micro-batch"
        )
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", *_MARKS)}
    embedded = host.get_input_embeddings()(inputs["input_ids"])
    if family.num_position_axes > 1 and rest.get("position_ids") is None:
        # When it is given embeddings, the host would continue positions from the images of an
        # earlier micro-batch.
        rest["position_ids"] = torch.arange(embedded.shape[1], device=embedded.device).expand(
            embedded.shape[:2]
        )
    image = family.empty_image(host.config, embedded)
    features = host.base_model.get_image_features(**image, return_dict=True)
    zero = sum(one.sum() for name in _FEATURES for one in _tensors(features.get(name))) * 0.0
    return {**rest, "inputs_embeds": embedded + zero.to(embedded.dtype)}


def _tensors(features: Any) -> Iterator[Tensor]:
    """Yield the tensors of a field, which is one, or a list of some, or missing."""
    if isinstance(features, Tensor):
        yield features
    elif features is not None:
        for one in features:
            yield from _tensors(one)
