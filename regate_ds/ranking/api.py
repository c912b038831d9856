"""Rank the images of a user's own data set, into a store that ``attach`` reads."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regate_ds.algorithm.rankings.ranking import Ranking, StoredRanking
from regate_ds.algorithm.rankings.table import RANKINGS, stored_ranking
from regate_ds.data.collate import Batch
from regate_ds.data.keyed import Keyed, KeyedCollate
from regate_ds.families.numbering import numbering_of
from regate_ds.families.pictures import pictures_of
from regate_ds.families.table import family_of
from regate_ds.parallel.layout import ProcessGroup, require_group
from regate_ds.ranking.identity import vision_id
from regate_ds.ranking.job import PictureInputs, RankCost, RankJob, Units, rank_pictures
from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.stores.image_orders.pictures import PictureColumns, ShownPicture
from regate_ds.teacher.online import samples_of


def rank_images(  # noqa: PLR0913 (a user's call: each argument by its name)
    data: Keyed,
    collate_fn: Callable[[list[Any]], Any],
    model: Any,
    ranking: Ranking,
    store: str | Path,
    *,
    batch: int = 16,
    group: ProcessGroup | None = None,
) -> RankCost:
    """Rank the tokens of each image once, and write the store that ``attach`` reads. Resumable.

    data, collate_fn: those of the training loop, without augmentation of the images. Each image of
        each sample is run once, also where several samples show one picture.
    model: the multimodal model before it is trained, on its device, not wrapped in anything.
    ranking: ``images.ranking`` of the configuration.
    batch: images of one forward pass; a sample with more is a batch of its own.
    group: the ranks that share the work; all of them make this call. A job of several ranks must
        give it.

    ValueError names the image, the ranking or the store that is refused.
    """
    require_group(group, "rank_images")
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch={batch!r}: must be a whole number, at least 1")
    if hasattr(model, "get_base_model"):
        raise ValueError(
            f"model={type(model).__name__}: rank with the model as it is before peft wraps it"
        )
    stored, rows = require_stored(ranking), _Rows(data, collate_fn, model)
    job = RankJob(
        units=rows.units(),
        read=rows.read,
        look=partial(pictures_of, model, reads=stored.reads),
        ranking=stored,
        fingerprint=rows.index.fingerprint,
        model_id=model_id_for(stored, model),
        store=Path(store),
        batch=batch,
    )
    return rank_pictures(job, group, next(model.parameters()).device)


def require_stored(ranking: Ranking) -> StoredRanking:
    """Return the ranking whose orders are to be computed; ValueError if it reads none."""
    if not isinstance(ranking, tuple(RANKINGS.values())):
        raise ValueError(
            f"ranking={ranking!r} is a {type(ranking).__name__}; give a ranking, such as "
            "DiversityOrder()"
        )
    if (stored := stored_ranking(ranking)) is None:
        raise ValueError(
            f"images.ranking={type(ranking).__name__} needs no store, so there is nothing to "
            "compute; train at once, or choose pixels, diversity, attention or mixed"
        )
    return stored


def model_id_for(ranking: StoredRanking, model: Any) -> str | None:
    """Name the model whose orders these will be; None if the ranking reads pixels alone."""
    return None if ranking.reads == "pixels" else vision_id(model)


_NOT_RANKED = ("pixel_values_videos", "image_sizes")
"""Model inputs of videos, and of towers for images of any size, that no family here ranks."""


class _Rows:
    """The samples of a data set that have images; each is a unit of its images."""

    def __init__(self, data: Keyed, collate_fn: Callable[[list[Any]], Any], model: Any) -> None:
        self._data, self._names = data, family_of(model).image_inputs
        if not hasattr(model, "get_image_features"):
            raise ValueError(
                f"images of a {type(model).__name__} cannot be ranked, as it has no "
                "get_image_features; use images.ranking=random or stride"
            )
        self._token_id = model.config.image_token_id
        self._collate = KeyedCollate(collate_fn, numbering_of(model, elides_images=True))
        self._pictures, self._first, self._row_of = PictureColumns(), array("q", [0]), array("q")
        self.index = AnswerIndex.build(self._samples())

    def units(self) -> Units:
        """Return the pictures of each sample that has some."""
        return Units(self._pictures.table(), np.array(self._first))

    def read(self, unit: int) -> PictureInputs:
        """Return the image inputs of a unit's sample."""
        inputs = self._collate([self._data[self._row_of[unit]]]).inputs
        return {name: inputs[name] for name in self._names}

    def _samples(self) -> Any:
        for row in range(len(self._data)):
            batch = self._collate([self._data[row]])
            if shown := _images_of(batch):
                self._require_inputs(batch)
                for one in shown:
                    self._pictures.add(one)
                self._first.append(self._first[-1] + len(shown))
                self._row_of.append(row)
            yield from samples_of(batch, [self._token_id])

    def _require_inputs(self, batch: Batch) -> None:
        """Refuse, by ValueError naming it, a sample whose images are not what the family ranks."""
        (name, record), given = batch.tokens.flat_keys[0], batch.inputs
        if other := [one for one in _NOT_RANKED if given.get(one) is not None]:
            raise ValueError(
                f"sample {name!r} record {record} has {other[0]}, which is not ranked; use "
                "images.ranking=random or stride"
            )
        if missing := [one for one in self._names if given.get(one) is None]:
            raise ValueError(
                f"sample {name!r} record {record} has image tokens, but its collated batch lacks "
                f"{missing[0]}; make the collate function return what the model takes"
            )


def _images_of(batch: Batch) -> list[ShownPicture]:
    """Return the images of a micro-batch of one sample, each a picture of its own."""
    image_BT, (key,) = batch.tokens.image_BT, batch.tokens.flat_keys
    if image_BT is None:
        return []
    numbers = image_BT[image_BT >= 0].unique_consecutive().tolist()
    if sorted(set(numbers)) != list(range(len(set(numbers)))) or numbers != sorted(numbers):
        raise ValueError(
            f"sample {key[0]!r} record {key[1]} numbers its images {numbers[:8]}; number them "
            "from 0 in reading order, so that each is ranked by its own picture"
        )
    sizes = torch.bincount(image_BT[image_BT >= 0]).tolist()
    return [ShownPicture(size, ((key, number),)) for number, size in enumerate(sizes)]
