"""What processors write for an image, from its size by their own arithmetic, without an image.

A blank image tells the same, and takes 20 to 120 ms: too long where each image has another size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Size = tuple[int, int]
"""Width and height of an image file."""

Count = Callable[[Any, Size], str]
"""Returns what a processor writes for an image that is alone in its sample."""


def _patches(processor: Any, size: Size) -> str:
    """Return one token for each patch, without any around them."""
    width, height = size
    found = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
    return processor.image_token * found["num_image_tokens"][0]


def _tiles(processor: Any, size: Size) -> str:
    """Let the processor write as many tiles as its image processor will cut."""
    return processor.replace_image_token({"num_patches": [_cut(processor, size)]}, 0)


def _rows(processor: Any, size: Size) -> str:
    """The same where the tiles have rows and columns."""
    _, num_rows, num_columns = _cut(processor, size)
    return processor.replace_image_token({"rows": [[num_rows]], "cols": [[num_columns]]}, 0)


def _cut(processor: Any, size: Size) -> Any:
    width, height = size
    settings = processor._merge_kwargs()["images_kwargs"]
    return processor.image_processor.get_number_of_image_patches(height, width, settings)


IMAGE_COUNTS: dict[str, Count] = {
    "AyaVisionProcessor": _tiles,
    "Idefics3Processor": _rows,
    "InternVLProcessor": _tiles,
    "LlavaNextProcessor": _patches,
    "LlavaNextVideoProcessor": _patches,
    "LlavaOnevisionProcessor": _patches,
    "LlavaProcessor": _patches,
    "Qwen2VLProcessor": _patches,
    "Qwen2_5_VLProcessor": _patches,
    "Qwen3VLProcessor": _patches,
    "SmolVLMProcessor": _rows,
}
"""By class of processor. Tests compare each with the processor's own call."""
