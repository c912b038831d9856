"""The images of a micro-batch, and which of their tokens a sparse step keeps.

Shapes: B rows, T positions, I images of the micro-batch, M their tokens, image by image.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regate_ds.algorithm.batch import IMAGE, TokenBatch
from regate_ds.algorithm.quotas.quota import share_of
from regate_ds.algorithm.rankings.ranking import ImageKey, Ranking, RankingInputs

ReadOrders = Callable[[Sequence[ImageKey], Sequence[int]], list[Tensor]]
"""Returns the stored order of each image, int64 [n], given the images and their token counts."""


@dataclass(frozen=True)
class Images:
    """Where the tokens of a micro-batch's images lie."""

    keys: tuple[ImageKey, ...]
    sizes_I: Tensor
    """int64: tokens of each image."""

    image_M: Tensor
    """int64: the image of each token."""

    position_M: Tensor
    """int64: flat position of each token in [B * T], in reading order within its image."""

    is_elidable_M: Tensor
    """bool: False for tokens that predict an answer, and for the first position of a sample."""


def find_images(batch: TokenBatch) -> Images:
    """Return the images of a micro-batch. ValueError if it does not tell where they are."""
    if batch.image_BT is None:
        raise ValueError(
            "images.keep_share is below 1, but a micro-batch does not tell which positions are "
            "images (image_BT=None); give image_BT in its TokenBatch, or set images.keep_share=1.0"
        )
    sample_P, image_P = batch.sample_BT.reshape(-1), batch.image_BT.reshape(-1)
    position_P = ((sample_P >= 0) & (image_P >= 0)).nonzero().squeeze(1)
    # One number for each pair of sample and image: rows would be compared far more slowly.
    base = int(image_P.max()) + 1
    pair_P = sample_P[position_P] * base + image_P[position_P]
    pairs_I, image_P, sizes_I = pair_P.unique(return_inverse=True, return_counts=True)
    order_M = image_P.argsort(stable=True)
    position_M, flat_keys = position_P[order_M], batch.flat_keys
    return Images(
        keys=tuple((flat_keys[pair // base], pair % base) for pair in pairs_I.tolist()),
        sizes_I=sizes_I,
        image_M=image_P[order_M],
        position_M=position_M,
        is_elidable_M=batch.kind_BT.reshape(-1)[position_M] == IMAGE,
    )


def beyond_kept(
    ranking: Ranking,
    batch: TokenBatch,
    *,
    keep_share: float,
    step: int,
    read_orders: ReadOrders | None = None,
) -> Tensor:
    """Return each image token's place in its image's order, less the number that are kept.

    int64 [B, T]: below 0 is kept, and the lowest others are the next best; 0 elsewhere. The order
    is of the image's n IMAGE positions alone, of which ceil(keep_share * n) are kept.

    ValueError if the micro-batch has no image_BT, or the ranking or its store returns no order.
    """
    images = find_images(batch)
    orders = None
    if ranking.stored is not None:
        assert read_orders is not None
        orders = _stored_orders(images, read_orders)
    image_M = images.image_M[images.is_elidable_M]
    num_I = torch.bincount(image_M, minlength=len(images.keys))
    num_kept_I = share_of(num_I, keep_share)
    inputs = RankingInputs(
        step=step, keys=images.keys, sizes_I=num_I, num_kept_I=num_kept_I, orders=orders
    )
    place_M = _require_places(ranking, inputs, image_M)
    beyond_P = torch.zeros(batch.labels_BT.numel(), dtype=torch.int64)
    beyond_P[images.position_M[images.is_elidable_M]] = place_M - num_kept_I[image_M]
    return beyond_P.view_as(batch.labels_BT)


def _stored_orders(images: Images, read_orders: ReadOrders) -> list[Tensor]:
    """Return the stored order of each image's elidable tokens, numbered among themselves.

    ValueError if an order does not name each token of its image once.
    """
    sizes = images.sizes_I.tolist()
    orders, elidable = read_orders(images.keys, sizes), images.is_elidable_M.split(sizes)
    found: list[Tensor] = []
    for key, is_elidable_n, order_n in zip(images.keys, elidable, orders, strict=True):
        if not torch.equal(order_n.sort().values, torch.arange(len(is_elidable_n))):
            raise ValueError(
                f"the order of image {key} in the store does not name each of its "
                f"{len(is_elidable_n)} tokens once: it has {len(order_n)}; make the store anew "
                "with `regate rank`"
            )
        number_n = is_elidable_n.long().cumsum(0) - 1
        found.append(number_n[order_n[is_elidable_n[order_n]]])
    return found


def _require_places(ranking: Ranking, inputs: RankingInputs, image_M: Tensor) -> Tensor:
    """Return the places [M] of all tokens; ValueError if an image's are not 0 to n - 1."""
    place_M: Any = ranking(inputs)
    start_I = inputs.sizes_I.cumsum(0) - inputs.sizes_I
    wanted_M = torch.arange(len(image_M)) - start_I[image_M]
    is_tensor = isinstance(place_M, Tensor)
    if not is_tensor or place_M.shape != wanted_M.shape or place_M.is_floating_point():
        found = f"{place_M.dtype} {tuple(place_M.shape)}" if is_tensor else type(place_M).__name__
        raise ValueError(
            f"{type(ranking).__name__} returned {found}; it must return whole numbers of shape "
            f"{tuple(wanted_M.shape)}"
        )
    is_inside_M = (place_M >= 0) & (place_M < inputs.sizes_I[image_M])
    is_taken_M = torch.zeros(len(image_M), dtype=torch.bool)
    is_taken_M[(start_I[image_M] + place_M)[is_inside_M]] = True
    # As many places as tokens: where one is out of range or given twice, another is left over.
    if not is_taken_M.all():
        image = int(image_M[(~is_taken_M).nonzero()[0]])
        raise ValueError(
            f"{type(ranking).__name__} gave image {inputs.keys[image]} places that are not 0 to "
            f"{int(inputs.sizes_I[image]) - 1}, each once"
        )
    return place_M
