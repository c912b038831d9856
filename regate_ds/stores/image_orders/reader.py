"""Read the orders of image tokens from disk, where they were computed once before training."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from regate_ds.algorithm.rankings.ranking import ImageKey, StoredRanking
from regate_ds.stores.image_orders.manifest import ORDERS, TOKEN, OrdersManifest, starts_of_shards
from regate_ds.stores.image_orders.pictures import name_of, num_stored
from regate_ds.stores.kind import Verify


class ImageOrderStore:
    """The orders of the images of a data set, memory-mapped.

    Opening a store checks the manifest and the table of pictures, and the checksum at the end of
    each shard against the manifest. A shard's orders are checked when the first of them is read;
    ``verify="full"`` checks all of them on opening.
    """

    def __init__(self, path: Path | str, *, verify: Verify = "quick") -> None:
        """Open a finished store. ``ValueError`` names a file that is missing or damaged."""
        self.path = Path(path)
        self._manifest = OrdersManifest.load(self.path)
        self._files = self._manifest.files(self.path)
        if not self._manifest.is_finished:
            num_missing = sum(not file.path.exists() for file in self._files)
            raise ORDERS.unfinished(self.path, num_missing, len(self._files))
        self._table = self._manifest.load_table(self.path)
        self._first = starts_of_shards([shard.num_pictures for shard in self._manifest.shards])
        lengths_P = (self._table.sizes_P.astype(np.int64) + 1) // 2
        self._start_of = np.cumsum(np.concatenate([[0], lengths_P]))
        self._open = [file.open() for file in self._files]
        self._checked: dict[int, np.ndarray] = {}
        if verify == "full":
            for number in range(len(self._files)):
                self._tokens(number)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the data that the orders belong to."""
        return self._manifest.fingerprint

    @property
    def ranking(self) -> str:
        """Name and knobs of the ranking that the orders are of."""
        return self._manifest.ranking

    @property
    def model_id(self) -> str | None:
        """Name of the tower and the projector that they were computed with; None for pixels."""
        return self._manifest.model_id

    @property
    def num_pictures(self) -> int:
        return len(self._table)

    @property
    def num_images(self) -> int:
        """Number of images of all samples; several may show one picture."""
        return self._table.num_images

    def require(self, fingerprint: str) -> None:
        """Refuse, by ``ValueError``, data with another fingerprint than the orders are of."""
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"the image orders in {self.path} belong to data with fingerprint "
                f"{self.fingerprint}, this run's data has {fingerprint}; run `{ORDERS.command}` on "
                "this run's data, or train on the data of the store"
            )

    def require_ranking(self, ranking: StoredRanking) -> None:
        """Refuse, by ``ValueError``, another ranking or other knobs than the orders are of."""
        if ranking.stored != self.ranking:
            raise ValueError(
                f"the image orders in {self.path} were computed for images.ranking {self.ranking}, "
                f"this run has {ranking.stored}; compute them for this one "
                f"({ORDERS.command} CONFIG, or {ORDERS.call}), or use the ranking of the store"
            )

    def read(self, images: Sequence[ImageKey], sizes: Sequence[int]) -> list[Tensor]:
        """Return each image's tokens in their order, int64 [n].

        ValueError names an image that the store does not have, or has with another number of
        tokens, or a damaged shard.
        """
        return [self._order(image, size) for image, size in zip(images, sizes, strict=True)]

    def _order(self, image: ImageKey, size: int) -> Tensor:
        picture = self._table.find(image)
        if picture is None:
            raise ValueError(
                f"{name_of(image)} is not among the {self.num_images} images of the store "
                f"{self.path}; run `{ORDERS.command}` on the data that is trained on"
            )
        stored = int(self._table.sizes_P[picture])
        if stored != size:
            raise ValueError(
                f"{name_of(image)} has {size} tokens here, but {stored} in the store {self.path}; "
                f"run `{ORDERS.command}` again, or, where augmentation changes the images, use "
                "images.ranking=random or stride, which read no store"
            )
        shard = bisect_right(self._first, picture) - 1
        start = int(self._start_of[picture] - self._start_of[self._first[shard]])
        first = self._tokens(shard)[start : start + num_stored(size)]
        return _completed(torch.from_numpy(first.astype(np.int64)), size)

    def _tokens(self, number: int) -> np.ndarray:
        """Return a shard's tokens; check them the first time."""
        if number not in self._checked:
            self._checked[number] = self._files[number].checked(self._open[number]).view(TOKEN)
        return self._checked[number]


def _completed(first: Tensor, num_tokens: int) -> Tensor:
    """Return an order of all tokens: the first ones as given, the others by index."""
    is_left_n = torch.ones(num_tokens, dtype=torch.bool)
    is_left_n[first] = False
    return torch.cat([first, is_left_n.nonzero().squeeze(1)])
