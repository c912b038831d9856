"""What a processor writes in the place of an image or a video, from its shape alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Protocol

from PIL import Image

from regate_ds.data.chat.counting import IMAGE_COUNTS, Size
from regate_ds.data.chat.video_text import VideoText
from regate_ds.data.llava.clips import VisualShape
from regate_ds.data.llava.media import VideoShape

_CUTS_ONE_ALONE = ("LlavaOnevisionProcessor",)
"""Processors that cut an image into tiles only where its sample has no other."""

_COMPARED = 3
"""Number of sizes for which counting and asking are compared, before counting is relied on."""


class ImageWriter(Protocol):
    """Writes what stands for images and videos in a text."""

    placeholder: str
    """What stands for an image in a rendered template."""

    patch: str
    """The token of each patch."""

    video_placeholder: str | None
    video_patch: str | None
    """The same of a video; None if there can be none."""

    no_videos: str | None
    """Why videos cannot be written; None if they can."""

    def texts(self, shapes: Sequence[VisualShape]) -> list[str]:
        """Return what stands for each image and video of a sample. ValueError for a shape that it
        cannot have."""
        ...

    def taken(self, shape: VideoShape) -> tuple[int, ...]:
        """Return the numbers of the frames that are taken from a video."""
        ...

    def settings(self) -> dict[str, Any]:
        """Return what decides the texts, as JSON can hold it."""
        ...


class ImageText:
    """Writes images as one processor does.

    It counts where that is right, else it asks the processor once for each distinct size.
    """

    def __init__(self, processor: Any, patch: str, video_frames: int | None = None) -> None:
        """Set up for one processor.

        patch: the token that the model puts an image's features in the place of. video_frames:
            the number of frames to take from a video's file; None leaves it to the processor.
        """
        self._videos = VideoText(processor, video_frames)
        self.video_placeholder, self.video_patch = self._videos.placeholder, self._videos.patch
        self.no_videos = self._videos.lack
        self.placeholder: str = processor.image_token
        self.patch = patch
        self._processor = processor
        self._count = IMAGE_COUNTS.get(type(processor).__name__)
        self._num_compared = 0
        self._cuts_one_alone = type(processor).__name__ in _CUTS_ONE_ALONE
        self._known: dict[Size | None, str] = {}

    def texts(self, shapes: Sequence[VisualShape]) -> list[str]:
        """Return what stands for each image and video of a sample.

        ValueError, from the processor, for a shape that it does not take.
        """
        is_alone = sum(not isinstance(shape, VideoShape) for shape in shapes) == 1
        return [
            self._videos.write(shape).text
            if isinstance(shape, VideoShape)
            else self._text(shape, is_alone)
            for shape in shapes
        ]

    def taken(self, shape: VideoShape) -> tuple[int, ...]:
        return self._videos.write(shape).taken

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
            "videos": self._videos.settings(),
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

    def __init__(
        self, images: ImageWriter, *, placeholder: str, video_placeholder: str | None, patch: str
    ) -> None:
        self.placeholder, self.patch = placeholder, patch
        self.video_placeholder: str | None = video_placeholder
        self.video_patch: str | None = patch
        self.no_videos = images.no_videos
        self._images = images

    def texts(self, shapes: Sequence[VisualShape]) -> list[str]:
        own = self._images
        return [
            self.patch
            * text.count(own.video_patch or "" if isinstance(shape, VideoShape) else own.patch)
            for text, shape in zip(own.texts(shapes), shapes)
        ]

    def taken(self, shape: VideoShape) -> tuple[int, ...]:
        return self._images.taken(shape)

    def settings(self) -> dict[str, Any]:
        return {"patch": self.patch, "as": self._images.settings()}
