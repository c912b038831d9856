"""Begin or resume a store of image orders, and write it shard by shard.

A shard appears whole, by atomic rename; the manifest gets the checksums last. Any number of
processes may write to one store, each its own shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from regate_ds.stores.atomic_file import TEMPORARY_SUFFIX, make_folder, write_atomically
from regate_ds.stores.image_orders.manifest import (
    ORDERS,
    TOKEN,
    OrdersManifest,
    OrdersSubject,
    starts_of_shards,
)
from regate_ds.stores.image_orders.pictures import name_of, num_stored
from regate_ds.stores.kind import MANIFEST_NAME, hash_of
from regate_ds.stores.shard_job import names_in

_SHARDS = "shard-*.u16"


def is_complete_orders(path: Path, subject: OrdersSubject) -> bool:
    """Return whether the folder is the finished store of this subject, without leftovers.

    It only reads. ``ValueError`` if the store is of something else, or if a file other than a shard
    is damaged.
    """
    found = _current(path, subject)
    if found is None or not found.is_finished:
        return False
    has_files = names_in(path).issuperset(file.path.name for file in found.files(path))
    if not has_files or not found.table_path(path).exists() or _leftovers(path, found):
        return False
    found.load_table(path)
    return True


def begin_orders(
    path: Path, subject: OrdersSubject, batch: int, num_pictures: Sequence[int]
) -> None:
    """Make the folder ready for writers. One process calls it, before them, at every start.

    num_pictures: the number of pictures of each shard.

    ``ValueError`` as in ``is_complete_orders``, and if the store was begun with another batch size.
    """
    make_folder(path)
    found = _current(path, subject)
    manifest = OrdersManifest.of(subject, batch, num_pictures) if found is None else found
    is_there = [file.path.exists() for file in manifest.files(path)]
    if found is not None and not all(is_there):
        ORDERS.require_setting(path, "rank.batch", found.batch, batch)
    # Shards without a file are computed again, and other hardware may find another order.
    shards = [
        s if there else replace(s, sha256=None) for s, there in zip(manifest.shards, is_there)
    ]
    manifest = replace(manifest, shards=tuple(shards))
    if not manifest.table_path(path).exists():
        write_atomically(manifest.table_path(path), subject.table.to_bytes())
    # Written last: from here on the folder names what it is to hold.
    if manifest != found:
        write_atomically(path / MANIFEST_NAME, manifest.to_bytes())


def _current(path: Path, subject: OrdersSubject) -> OrdersManifest | None:
    """Return the manifest in the folder, or None; ValueError if it is of something else."""
    if not ORDERS.holds(path, _SHARDS):
        return None
    found, pictures = OrdersManifest.load(path), hash_of(subject.table.to_bytes())
    for what, old, new in (
        ("data with fingerprint", found.fingerprint, subject.fingerprint),
        ("the ranking", found.ranking, subject.ranking),
        ("the model", found.model_id, subject.model_id),
        ("pictures with hash", found.pictures_sha256, pictures),
    ):
        ORDERS.require_same(path, what, old, new)
    return found


def _leftovers(path: Path, manifest: OrdersManifest) -> list[Path]:
    """Return the store's files in the folder that the manifest does not name, as after a kill."""
    named = {manifest.table_path(path), *(file.path for file in manifest.files(path))}
    forms = (_SHARDS, "pictures-*.npz", f".*{TEMPORARY_SUFFIX}")
    return sorted(file for form in forms for file in path.glob(form) if file not in named)


class ImageOrderWriter:
    """A store that is being computed; ``begin_orders`` must have made its folder ready."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifest = OrdersManifest.load(path)
        self._table = self._manifest.load_table(path)
        self._first = starts_of_shards([shard.num_pictures for shard in self._manifest.shards])
        self.files = self._manifest.files(path)

    def pictures(self, number: int) -> range:
        """Return the numbers of a shard's pictures."""
        return range(self._first[number], self._first[number + 1])

    def write_shard(self, number: int, orders: Sequence[Tensor]) -> None:
        """Write the first half of the order of each of a shard's pictures, int64.

        ``ValueError`` names an image whose order is none. ``OSError`` names the file if the store
        has vanished or the disk is full.
        """
        for picture, order in zip(self.pictures(number), orders, strict=True):
            self._require_order(picture, order)
        ORDERS.require_there(self.path / MANIFEST_NAME)
        self.files[number].write(torch.cat(list(orders)).numpy().astype(TOKEN).tobytes())

    def finish(self) -> None:
        """Check every shard, write the checksums into the manifest, and delete the files that a
        killed job left behind. One process calls it, last."""
        ORDERS.require_there(self.path / MANIFEST_NAME)
        pairs = zip(self._manifest.shards, self.files)
        shards = tuple(replace(shard, sha256=file.check()) for shard, file in pairs)
        self._manifest = replace(self._manifest, shards=shards)
        write_atomically(self.path / MANIFEST_NAME, self._manifest.to_bytes())
        for path in _leftovers(self.path, self._manifest):
            path.unlink()

    def _require_order(self, picture: int, order: Tensor) -> None:
        shown = self._table[picture]
        wanted, found = num_stored(shown.num_tokens), sorted(set(order.tolist()))
        if len(order) == len(found) == wanted and 0 <= found[0] <= found[-1] < shown.num_tokens:
            return
        raise ValueError(
            f"{name_of(shown.images[0])}: the ranking gave {len(order)} tokens, {len(found)} "
            f"of them different; it must give {wanted}, each below {shown.num_tokens}, once"
        )
