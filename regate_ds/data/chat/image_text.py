"""What a processor writes in the place of an image, from the image's size alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from PIL import Image

Size = tuple[int, int]
"""Width and height of an image file."""


def _patches_alone(processor: Any, size: Size) -> str:
    """Return one token for each patch, without any around them."""
    width, height = size
    found = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
    return processor.image_token * found["num_image_tokens"][0]


_COUNTED: dict[str, Callable[[Any, Size], str]] = {
    "Qwen2VLProcessor": _patches_alone,
    "Qwen2_5_VLProcessor": _patches_alone,
    "Qwen3VLProcessor": _patches_alone,
}
"""Processors that can count the tokens of an image without one, as tests show."""


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
    """Writes images as one processor does. It asks the processor once for each distinct size."""

    def __init__(self, processor: Any, patch: str) -> None:
        """patch: the token that the model puts an image's features in the place of."""
        self.placeholder: str = processor.image_token
        self.patch = patch
        self._processor = processor
        self._count = _COUNTED.get(type(processor).__name__)
        self._known: dict[tuple[Size, bool], str] = {}

    def texts(self, sizes: Sequence[Size]) -> list[str]:
        """Return what stands for each image of a sample.

        ValueError, from the processor, for a size that it does not take.
        """
        # LLaVA-OneVision cuts an image into tiles only where a sample has no other.
        return [self._text(size, len(sizes) == 1) for size in sizes]

    def num_patches(self, size: Size) -> int:
        """Return the number of tokens that stand for an image's patches, in a sample of its own."""
        return self._text(size, True).count(self.patch)

    def settings(self) -> dict[str, Any]:
        """Return what decides the texts, as JSON can hold it."""
        own = json.loads(self._processor.to_json_string())
        return {
            "class": type(self._processor).__name__,
            "images": json.loads(self._processor.image_processor.to_json_string()),
            "own": {name: own[name] for name in sorted(own) if not isinstance(own[name], dict)},
        }

    def _text(self, size: Size, is_alone: bool) -> str:
        key = (size, is_alone)
        if key not in self._known:
            count = self._count
            self._known[key] = count(self._processor, size) if count else self._asked(*key)
        return self._known[key]

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
