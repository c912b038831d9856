"""Which pictures a store has orders of, and which images of the data show each.

A picture that several samples show has one order. Shapes: P pictures, I images of all samples.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
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


@dataclass(frozen=True)
class PictureTable:
    """All pictures of a store, in the order in which their orders are stored."""

    pictures: tuple[ShownPicture, ...]

    def __post_init__(self) -> None:
        """Refuse, by ValueError naming the image, one that is too large or stands here twice."""
        for shown in self.pictures:
            if not 0 < shown.num_tokens <= MOST_TOKENS:
                raise ValueError(
                    f"{name_of(shown.images[0])} has {shown.num_tokens} tokens, a store of image "
                    f"orders takes 1 to {MOST_TOKENS}; make the image smaller, or use "
                    "images.ranking=random or stride, which read no store"
                )
        images = [image for shown in self.pictures for image in shown.images]
        if len(set(images)) != len(images):
            seen: set[ImageKey] = set()
            twice = next(image for image in images if image in seen or seen.add(image))
            raise ValueError(f"{name_of(twice)} is given twice; give each image one picture")

    @cached_property
    def picture_of(self) -> dict[ImageKey, int]:
        """The number of the picture that each image shows."""
        return {image: p for p, shown in enumerate(self.pictures) for image in shown.images}

    def describe(self, start: int, end: int) -> bytes:
        """Return the pictures of a shard as text, to be hashed."""
        return json.dumps([[s.num_tokens, s.images] for s in self.pictures[start:end]]).encode()

    def to_bytes(self) -> bytes:
        """Return the table as an npz file. Equal tables give equal bytes."""
        images = [(p, *image) for p, shown in enumerate(self.pictures) for image in shown.images]
        names, name_I = np.unique([key[0] for _, key, _ in images], return_inverse=True)
        buffer = io.BytesIO()
        np.savez(
            buffer,
            sizes=np.array([shown.num_tokens for shown in self.pictures], dtype=np.uint16),
            names=names.astype(str),
            name_numbers=name_I.astype(np.int32),
            record_numbers=np.array([key[1] for _, key, _ in images], dtype=np.int64),
            image_numbers=np.array([number for _, _, number in images], dtype=np.int32),
            pictures=np.array([picture for picture, _, _ in images], dtype=np.int32),
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> PictureTable:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            saved = {name: file[name] for name in file.files}
        names = [str(name) for name in saved["names"]]
        columns = ("pictures", "name_numbers", "record_numbers", "image_numbers")
        images: list[list[ImageKey]] = [[] for _ in saved["sizes"]]
        for picture, name, record, number in zip(*(saved[column].tolist() for column in columns)):
            images[picture].append(((names[name], record), number))
        sizes = saved["sizes"].tolist()
        return cls(tuple(ShownPicture(size, tuple(shown)) for size, shown in zip(sizes, images)))


def name_of(image: ImageKey) -> str:
    """Name an image in a message."""
    (name, record), number = image
    return f"image {number} of sample {name!r} record {record}"


def num_stored(num_tokens: int) -> int:
    """Return how many of an image's tokens are stored: the first half; the rest follow by index."""
    return -(-num_tokens // 2)


def count_stored(pictures: Sequence[ShownPicture]) -> int:
    """Return how many numbers are stored of these pictures."""
    return sum(num_stored(shown.num_tokens) for shown in pictures)
