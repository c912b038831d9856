"""Run the vision tower on empty images, times zero, where other ranks run it and this one does not.

This is needed because ranks of one data-parallel group must all reduce the same parameters in the
same order, whether or not their micro-batch has an image. `tower_calls.py` says how often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from regate_ds.adapters.attachment import Attachment
from regate_ds.adapters.huggingface.layer_inputs import ForwardPass
from regate_ds.adapters.huggingface.tower_calls import (
    IMAGE,
    PIXELS,
    VIDEO,
    Calls,
    calls_beside,
    kinds_of,
)
from regate_ds.families.family import Family
from regate_ds.families.table import FAMILIES, find_family

_FEATURES = ("pooler_output", "deepstack_features")
"""What of a tower's output enters the decoder. Its other fields may come from weights that a
micro-batch with images does not reach."""

_METHODS = {IMAGE: "get_image_features", VIDEO: "get_video_features"}

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
    """Add the empty images that a micro-batch with a plan needs.

    This happens inside the base model's own call, because under ZeRO-3 all ranks must enter modules
    in one order.
    """
    if regate_plan is None:
        return host_forward(*args, **kwargs)
    if regate_plan.tower is None:
        _require_one_kind(host, kwargs)
    call = partial(host_forward, *args, regate_plan=regate_plan)
    return call_with_tower(call, host, kwargs, regate_plan.tower)


def call_with_tower(
    call: Callable[..., Any], host: nn.Module, inputs: dict[str, Any], agreed: Calls | None
) -> Any:
    """Call the host's base model with these inputs, and make the tower's calls that it lacks.

    agreed: what every rank makes; None where one call is enough, whatever it is.
    """
    own = kinds_of(inputs)
    if agreed is None:
        agreed = own or (IMAGE,)
    beside = calls_beside(own, agreed)
    if not own:
        return _call_with_empties(call, host, inputs, beside)
    if not beside:
        return call(**inputs)
    (kind,) = own
    pixels = next(inputs[name] for name in PIXELS if inputs.get(name) is not None)
    # Not by a weight: under ZeRO-3 it would be gathered, on this rank alone.
    like = pixels.new_empty(0, dtype=host.dtype)
    empties = [partial(one, like=like) for one in _empty_calls(host, beside)]
    attachment = Attachment()
    # In the order of kinds, which all ranks keep: images before videos.
    with_empties = _after_empties if kind == VIDEO else _before_empties
    attachment.rebind(host.base_model, _METHODS[kind], with_empties, empties=empties)
    try:
        return call(**inputs)
    finally:
        attachment.remove()


def _call_with_empties(
    call: Callable[..., Any], host: nn.Module, inputs: dict[str, Any], beside: Calls
) -> Any:
    embedder = _family_of(host).embedder
    if embedder is None:
        return call(**with_empty_image(host, inputs, beside))
    attachment, module = Attachment(), host.base_model.get_submodule(embedder)
    attachment.rebind_forward(module, _embed_with_zero, empties=_empty_calls(host, beside))
    try:
        return call(**inputs)
    finally:
        attachment.remove()


def _embed_with_zero(
    host_embed: Any,
    input_ids: Tensor,
    inputs_embeds: Tensor,
    *,
    empties: Sequence[Callable[..., Tensor]],
    **kwargs: Any,
) -> Tensor:
    zero = _total(empty(like=inputs_embeds) for empty in empties)
    return host_embed(input_ids, inputs_embeds + zero.to(inputs_embeds.dtype), **kwargs)


def _before_empties(
    host_features: Any, *args: Any, empties: Sequence[Callable[[], Tensor]], **kwargs: Any
) -> Any:
    features = host_features(*args, **kwargs)
    return _with_zero(features, _total(empty() for empty in empties))


def _after_empties(
    host_features: Any, *args: Any, empties: Sequence[Callable[[], Tensor]], **kwargs: Any
) -> Any:
    zero = _total(empty() for empty in empties)
    return _with_zero(host_features(*args, **kwargs), zero)


def _with_zero(features: Any, zero: Tensor) -> Any:
    """Add to the features that enter the decoder; those of several images may be a sequence."""
    pooled = features.pooler_output
    if isinstance(pooled, Tensor):
        features.pooler_output = pooled + zero.to(pooled.dtype)
    else:
        first, *others = pooled
        features.pooler_output = (first + zero.to(first.dtype), *others)
    return features


def _require_one_kind(host: nn.Module, inputs: dict[str, Any]) -> None:
    """Refuse images and videos in one micro-batch under ZeRO-3 or FSDP2, if ranks cannot agree on
    calls.

    Each kind is a call of the tower, and a rank with one kind makes one call: the ranks would wait
    for each other's weights.
    """
    if len(kinds_of(inputs)) < 2 or not _enters_together(host):
        return
    found = (
        "a micro-batch has images and videos: under ZeRO-3 or FSDP2 a rank that has one of them "
        "would"
    )
    if find_family(host) is None:
        raise ValueError(
            f"{found} wait for the others, as the empty image of a {host.config.model_type} model "
            "is not known; put them into different micro-batches, or use stage 2"
        )
    raise ValueError(
        f"{found} wait for the others; give the model all that is in the batch, regate_tower too: "
        "engine(**batch)"
    )


def _enters_together(host: nn.Module) -> bool:
    """Return whether ranks enter modules together: ZeRO-3 gives numbers to parameters, and FSDP2
    another class to modules."""
    return any(hasattr(weight, "ds_id") for weight in host.parameters()) or any(
        isinstance(part, FSDPModule) for part in host.modules()
    )


def with_empty_image(
    host: nn.Module, inputs: dict[str, Any], calls: Calls = (IMAGE,)
) -> dict[str, Any]:
    """Return the inputs with ``inputs_embeds`` in place of ``input_ids``.

    The embeddings are those of the text plus zero times the features of empty images.

    ValueError for a model family whose empty image is not known: each micro-batch then needs an
    image.
    """
    family = _family_of(host)
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", *_MARKS)}
    embedded = host.get_input_embeddings()(inputs["input_ids"])
    if family.num_position_axes > 1 and rest.get("position_ids") is None:
        # When it is given embeddings, the host would continue positions from the images of an
        # earlier micro-batch.
        rest["position_ids"] = torch.arange(embedded.shape[1], device=embedded.device).expand(
            embedded.shape[:2]
        )
    zero = _total(empty(like=embedded) for empty in _empty_calls(host, calls))
    return {**rest, "inputs_embeds": embedded + zero.to(embedded.dtype)}


def _family_of(host: nn.Module) -> Family:
    family = find_family(host)
    if family is None:
        raise ValueError(
            f"a micro-batch has no image, which on several ranks needs an empty one, but that of a "
            f"{host.config.model_type} model is not known (only for {tuple(FAMILIES)}); put a "
            "sample with an image into every micro-batch"
        )
    return family


def _empty_calls(host: nn.Module, calls: Calls) -> list[Callable[..., Tensor]]:
    """Return for each call a function that makes it: of a tensor ``like`` whose dtype and device
    the empty image gets, to a zero that depends on all weights that the call reaches."""
    family = _family_of(host)
    images = {IMAGE: family.empty_image, VIDEO: family.empty_video}
    if family.embedder is not None:
        module = host.base_model.get_submodule(f"{family.embedder}.image_embed")
        return [partial(_zero_of_module, module, images[kind], host.config) for kind in calls]
    methods = {kind: getattr(host.base_model, _METHODS[kind]) for kind in calls}
    return [partial(_zero_of, methods[kind], images[kind], host.config) for kind in calls]


def _zero_of_module(module: Any, make_empty: Any, config: Any, like: Tensor) -> Tensor:
    return module(**make_empty(config, like)).sum() * 0.0


def _zero_of(features_of: Any, make_empty: Any, config: Any, like: Tensor) -> Tensor:
    features = features_of(**make_empty(config, like), return_dict=True)
    return _total(one.sum() for name in _FEATURES for one in _tensors(features.get(name))) * 0.0


def _total(values: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, values)


def _tensors(features: Any) -> Iterator[Tensor]:
    """Yield the tensors of a field, which is one, or a list of some, or missing."""
    if isinstance(features, Tensor):
        yield features
    elif features is not None:
        for one in features:
            yield from _tensors(one)
