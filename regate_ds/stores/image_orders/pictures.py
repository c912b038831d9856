"""Which pictures a store has orders of, and which images of the data show each.

A picture that several samples show has one order. Millions of images lie in arrays, of which a
``ShownPicture`` is made when it is asked for. Shapes: P pictures, I images of all samples.
"""

from __future__ import annotations

import io
import json
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from regate_ds.algorithm.rankings.ranking import ImageKey

MOST_TOKENS = 65535
"""Largest number of tokens of an image: their numbers are stored as uint16."""


@dataclass(frozen=True)
class ShownPicture:
    """A picture, and the images that show it: at least one."""

    num_tokens: int
    images: tuple[ImageKey, ...]


@dataclass(frozen=True, eq=False)
class PictureTable:
    """All pictures of a store, in the order in which their orders are stored."""

    sizes_P: np.ndarray
    """int32: number of tokens of each picture."""

    picture_I: np.ndarray
    """int32: the picture that each image shows, rising."""

    names: tuple[str, ...]
    """Names of the data sets in the images' keys, sorted, each once."""

    name_I: np.ndarray
    """int32: place in ``names``."""

    record_I: np.ndarray
    """int64"""

    number_I: np.ndarray
    """int32: the image's number in its sample."""

    def __post_init__(self) -> None:
        """Refuse, by ValueError naming the image, one that is too large or stands here twice."""
        wrong = np.flatnonzero((self.sizes_P < 1) | (self.sizes_P > MOST_TOKENS))
        if len(wrong):
            shown = self[int(wrong[0])]
            raise ValueError(
                f"{name_of(shown.images[0])} has {shown.num_tokens} tokens, a store of image "
                f"orders takes 1 to {MOST_TOKENS}; make the image smaller, or use "
                "images.ranking=random or stride, which read no store"
            )
        order_I = self._by_key
        columns = [column[order_I] for column in (self.name_I, self.record_I, self.number_I)]
        is_twice = np.logical_and.reduce([column[1:] == column[:-1] for column in columns])
        if is_twice.any():
            image = int(order_I[int(np.flatnonzero(is_twice)[0])])
            raise ValueError(
                f"{name_of(self._image(image))} is given twice; give each image one picture"
            )

    @classmethod
    def of(cls, pictures: Iterable[ShownPicture]) -> PictureTable:
        """Make a table of pictures; ValueError as above."""
        made = PictureColumns()
        for shown in pictures:
            made.add(shown)
        return made.table()

    def __len__(self) -> int:
        return len(self.sizes_P)

    def __getitem__(self, picture: int) -> ShownPicture:
        start, end = self._first_P1[picture : picture + 2].tolist()
        images = tuple(self._image(image) for image in range(start, end))
        return ShownPicture(int(self.sizes_P[picture]), images)

    @property
    def num_images(self) -> int:
        """Number of images of all samples; several may show one picture."""
        return len(self.picture_I)

    def take(self, pictures_P: np.ndarray) -> PictureTable:
        """Return the table of these pictures, in this order."""
        starts, counts = self._first_P1[pictures_P], np.diff(self._first_P1)[pictures_P]
        images_I = ranges(starts, counts)
        return PictureTable(
            self.sizes_P[pictures_P],
            np.repeat(np.arange(len(pictures_P), dtype=np.int32), counts),
            self.names,
            self.name_I[images_I],
            self.record_I[images_I],
            self.number_I[images_I],
        )

    def find(self, image: ImageKey) -> int | None:
        """Return the number of the picture that an image shows; None if it is not here."""
        (name, record), number = image
        if name not in self.names:
            return None
        order_I, which = self._by_key, self.names.index(name)
        start, end = np.searchsorted(self._sorted_names, [which, which + 1]).tolist()
        records = self._sorted_records[start:end]
        begin, until = (start + int(np.searchsorted(records, record, side)) for side in _SIDES)
        for place in order_I[begin:until].tolist():
            if int(self.number_I[place]) == number:
                return int(self.picture_I[place])
        return None

    @cached_property
    def _by_key(self) -> np.ndarray:
        """int32 [I]: the images in the order of their keys."""
        return np.lexsort((self.number_I, self.record_I, self.name_I)).astype(np.int32)

    @cached_property
    def _sorted_names(self) -> np.ndarray:
        return self.name_I[self._by_key]

    @cached_property
    def _sorted_records(self) -> np.ndarray:
        return self.record_I[self._by_key]

    @cached_property
    def _first_P1(self) -> np.ndarray:
        """int64 [P+1]: the first image of each picture, and their number."""
        return np.searchsorted(self.picture_I, np.arange(len(self.sizes_P) + 1))

    def _image(self, image: int) -> ImageKey:
        key = self.names[int(self.name_I[image])], int(self.record_I[image])
        return key, int(self.number_I[image])

    def num_stored(self, start: int, end: int) -> int:
        """Return how many numbers are stored of the pictures from ``start`` to ``end``."""
        return int(((self.sizes_P[start:end].astype(np.int64) + 1) // 2).sum())

    def describe(self, start: int, end: int) -> bytes:
        """Return the pictures of a shard as text, to be hashed."""
        shown = (self[picture] for picture in range(start, end))
        return json.dumps([[one.num_tokens, one.images] for one in shown]).encode()

    def to_bytes(self) -> bytes:
        """Return the table as an npz file. Equal tables give equal bytes."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            sizes=self.sizes_P.astype(np.uint16),
            names=np.array(self.names).astype(str),
            name_numbers=self.name_I,
            record_numbers=self.record_I,
            image_numbers=self.number_I,
            pictures=self.picture_I,
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> PictureTable:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return cls(
                file["sizes"].astype(np.int32),
                file["pictures"],
                tuple(str(name) for name in file["names"]),
                file["name_numbers"],
                file["record_numbers"],
                file["image_numbers"],
            )


_SIDES = ("left", "right")


class PictureColumns:
    """The columns of a table of pictures that are found one after the other."""

    def __init__(self) -> None:
        self._sizes, self._pictures, self._numbers = array("q"), array("i"), array("i")
        self._names, self._records = array("i"), array("q")
        self._name_numbers: dict[str, int] = {}

    def add(self, shown: ShownPicture) -> None:
        """Add a picture."""
        for (name, record), number in shown.images:
            self._pictures.append(len(self._sizes))
            self._names.append(self._name_numbers.setdefault(name, len(self._name_numbers)))
            self._records.append(record)
            self._numbers.append(number)
        self._sizes.append(shown.num_tokens)

    def table(self) -> PictureTable:
        """Return the pictures so far; ValueError as ``PictureTable``."""
        names = list(self._name_numbers)
        place_of = {name: place for place, name in enumerate(sorted(names))}
        places = np.array([place_of[name] for name in names], dtype=np.int32)
        sizes_P = np.array(self._sizes, dtype=np.int64)
        return PictureTable(
            sizes_P.clip(0, np.iinfo(np.int32).max).astype(np.int32),
            np.array(self._pictures, dtype=np.int32),
            tuple(sorted(names)),
            places[np.array(self._names, dtype=np.int32)],
            np.array(self._records, dtype=np.int64),
            np.array(self._numbers, dtype=np.int32),
        )


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the numbers from each start on, so many each, behind one another."""
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(starts - before, counts)


def name_of(image: ImageKey) -> str:
    """Name an image in a message."""
    (name, record), number = image
    return f"image {number} of sample {name!r} record {record}"


def num_stored(num_tokens: int) -> int:
    """Return how many of an image's tokens are stored: the first half; the rest follow by index."""
    return -(-num_tokens // 2)
