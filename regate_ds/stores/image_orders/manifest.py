"""What a store of image orders holds, and the names of its files.

    manifest.json        see ``OrdersManifest``
    pictures-....npz     the PictureTable: which pictures have orders, and which images show them
    shard-00000.u16      for each picture of a shard the first half of its tokens, in order:
                         little-endian uint16, then a checksum

The checksum of a shard covers the ranking, the model, and which pictures and images it is of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from regate_ds.stores.image_orders.pictures import PictureTable
from regate_ds.stores.kind import StoreKind, hash_of, sealed
from regate_ds.stores.shard_file import ShardFile

ORDERS = StoreKind(
    name="store of image orders",
    command="regate rank",
    call="rank_images",
    format=1,
    mark="ranking",
)

TOKEN = np.dtype("<u2")


@dataclass(frozen=True)
class OrdersShard:
    """The manifest's entry for one file of orders."""

    num_pictures: int
    num_tokens: int
    """Number of stored tokens of these pictures."""

    subject: str
    """Hash over the ranking, the model, the batch size and the shard's pictures and images."""

    sha256: str | None = None
    """Checksum of ``subject`` and the tokens; None until the store is finished, and while a shard
    is computed again."""


@dataclass(frozen=True, kw_only=True)
class OrdersSubject:
    """What the orders of a store are of."""

    fingerprint: str
    """Fingerprint of the answer index of the data."""

    ranking: str
    """Name and knobs of the ranking: ``StoredRanking.stored``."""

    model_id: str | None
    """Name of the tower and the projector; None if the ranking reads pixels alone."""

    table: PictureTable


@dataclass(frozen=True, kw_only=True)
class OrdersManifest:
    """What a store holds."""

    fingerprint: str
    ranking: str
    model_id: str | None
    batch: int
    """Number of pictures in a forward pass, which may change the last digit of a feature."""

    pictures_sha256: str
    shards: tuple[OrdersShard, ...]
    format: int = ORDERS.format

    @classmethod
    def of(cls, subject: OrdersSubject, batch: int, num_pictures: Sequence[int]) -> OrdersManifest:
        """Describe a store that is to be computed; ``num_pictures`` are those of each shard."""
        header = f"{subject.ranking}\n{subject.model_id}\n{batch}\n".encode()
        starts, shards = starts_of_shards(num_pictures), list[OrdersShard]()
        for start, end in zip(starts, starts[1:]):
            described = hash_of(header, subject.table.describe(start, end))
            stored = subject.table.num_stored(start, end)
            shards.append(OrdersShard(end - start, stored, described))
        return cls(
            fingerprint=subject.fingerprint,
            ranking=subject.ranking,
            model_id=subject.model_id,
            batch=batch,
            pictures_sha256=hash_of(subject.table.to_bytes()),
            shards=tuple(shards),
        )

    @property
    def is_finished(self) -> bool:
        """Whether every shard is computed and has its checksum here."""
        return all(shard.sha256 is not None for shard in self.shards)

    def to_bytes(self) -> bytes:
        """Return JSON that ends with its own checksum, so that a changed byte is found."""
        return sealed(asdict(self))

    @classmethod
    def load(cls, store: Path) -> OrdersManifest:
        """Read a store's manifest. ``ValueError`` names the file if it is missing or damaged."""
        fields = ORDERS.load_fields(store)
        return cls(**{**fields, "shards": tuple(OrdersShard(**one) for one in fields["shards"])})

    def table_path(self, store: Path) -> Path:
        return store / f"pictures-{self.pictures_sha256[:16]}.npz"

    def load_table(self, store: Path) -> PictureTable:
        """Read the store's pictures. ValueError if the file is missing or damaged."""
        content = ORDERS.content_of(self.table_path(store), self.pictures_sha256)
        return PictureTable.from_bytes(content)

    def files(self, store: Path) -> list[ShardFile]:
        """Return the file of each shard."""
        return [
            ShardFile(
                ORDERS,
                store / f"shard-{number:05d}.u16",
                shard.num_tokens * TOKEN.itemsize,
                shard.subject,
                shard.sha256,
            )
            for number, shard in enumerate(self.shards)
        ]


def starts_of_shards(num_pictures: Sequence[int]) -> list[int]:
    """Return the number of each shard's first picture, and the number of all pictures."""
    return list(accumulate(num_pictures, initial=0))
