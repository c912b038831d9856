"""What a processor writes in the place of an image, from the image's size alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Protocol

from PIL import Image

from regate_ds.data.chat.counting import IMAGE_COUNTS, Size

_CUTS_ONE_ALONE = ("LlavaOnevisionProcessor",)
"""Processors that cut an image into tiles only where its sample has no other."""

_COMPARED = 3
"""Number of sizes for which counting and asking are compared, before counting is relied on."""


class ImageWriter(Protocol):
    """Writes what stands for images in a text."""

    placeholder: str
    """What stands for an image in a rendered template."""

    patch: str
    """The token of each patch."""

    def texts(self, sizes: Sequence[Size]) -> list[str]:
        """Return what stands for each image of a sample. ValueError for a size it cannot have."""
        ...

    def settings(self) -> dict[str, Any]:
        """Return what decides the texts, as JSON can hold it."""
        ...


class ImageText:
    """Writes images as one processor does.

    It counts where that is right, else it asks the processor once for each distinct size.
    """

    def __init__(self, processor: Any, patch: str) -> None:
        """patch: the token that the model puts an image's features in the place of."""
        self.placeholder: str = processor.image_token
        self.patch = patch
        self._processor = processor
        self._count = IMAGE_COUNTS.get(type(processor).__name__)
        self._num_compared = 0
        self._cuts_one_alone = type(processor).__name__ in _CUTS_ONE_ALONE
        self._known: dict[Size | None, str] = {}

    def texts(self, sizes: Sequence[Size]) -> list[str]:
        """Return what stands for each image of a sample.

        ValueError, from the processor, for a size that it does not take.
        """
        return [self._text(size, len(sizes) == 1) for size in sizes]

    def num_patches(self, size: Size) -> int:
        """Return the number of tokens that stand for an image's patches, in a sample of its own."""
        return self._text(size, True).count(self.patch)

    def settings(self) -> dict[str, Any]:
        """Return what decides the texts, as JSON can hold it."""
        own = json.loads(self._processor.to_json_string())
        return {
            "class": type(self._processor).__name__,
            # Its arithmetic may be another in another version.
            "transformers": version("transformers"),
            "images": json.loads(self._processor.image_processor.to_json_string()),
            "own": {name: own[name] for name in sorted(own) if not isinstance(own[name], dict)},
        }

    def _text(self, size: Size, is_alone: bool) -> str:
        # What an image among others is, its size does not matter to those that cut one alone.
        key = size if is_alone or not self._cuts_one_alone else None
        if key not in self._known:
            text = self._asked(size, False) if key is None else self._counted(size)
            # Thousands of sizes may have one text, and a text thousands of patches.
            self._known[key] = sys.intern(text)
        return self._known[key]

    def _counted(self, size: Size) -> str:
        """Count, or ask if there is no count, or it is wrong with this processor's settings."""
        if self._count is None:
            return self._asked(size, True)
        if self._num_compared < _COMPARED:
            asked = self._asked(size, True)
            self._num_compared += 1
            if not self._agrees(size, asked):
                self._count = None
            return asked
        return self._count(self._processor, size)

    def _agrees(self, size: Size, asked: str) -> bool:
        assert self._count is not None
        try:
            return self._count(self._processor, size) == asked
        except (AttributeError, KeyError, TypeError):
            # The arithmetic of some classes needs settings that an image processor may lack.
            return False

    def _asked(self, size: Size, is_alone: bool) -> str:
        """Return what the processor's own call writes for a blank image."""
        blank = [Image.new("RGB", size)] * (1 if is_alone else 2)
        text = self.placeholder * len(blank)
        found = self._processor(images=[blank], text=[text], return_text_replacement_offsets=True)
        return found["text_replacement_offsets"][0][0]["replacement"]


class OtherPatches:
    """Writes as many tokens of another tokenizer as an image has patches, and nothing else."""

    def __init__(self, images: ImageWriter, *, placeholder: str, patch: str) -> None:
        self.placeholder, self.patch = placeholder, patch
        self._images = images

    def texts(self, sizes: Sequence[Size]) -> list[str]:
        own = self._images.patch
        return [self.patch * text.count(own) for text in self._images.texts(sizes)]

    def settings(self) -> dict[str, Any]:
        return {"patch": self.patch, "as": self._images.settings()}
