"""Turn what stands for an image or a video in a record into where it lies."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from regate_ds.data.llava.formats.said import shortened
from regate_ds.data.llava.images import MODES, as_shown, unusable_name
from regate_ds.data.llava.media import ImageSource, InlineImage, Video, VideoFrame
from regate_ds.data.llava.records import Cause
from regate_ds.data.llava.video import require_av

VideoFrames = int | Literal["whole"] | None
"""Number of frames to take from a video file; None refuses such files; "whole" leaves the frames of
each video to the model's own processor."""

FRAME_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
"""Suffixes of the files in a video's folder that count as its frames."""

_SCHEME = re.compile(r"(?i)([a-z][a-z0-9+.-]+)://")
_DATA = re.compile(r"(?is)data:[^,]*?;base64,(.*)")


@dataclass(frozen=True)
class Sources:
    """Finds the images and videos of one data file."""

    root: Path
    """Folder that names are relative to."""

    video_frames: VideoFrames = None
    inside_root: bool = False
    """True refuses files that lie outside of the folder, also by a link."""

    def image(self, field: str, entry: Any, number: int) -> Path | InlineImage:
        """Return where an image lies: its file, or its bytes. Cause if the entry names none.

        entry: a path, ``file://`` or ``data:`` address, bytes, an object with bytes or a path, or
            a picture of Pillow. number: the image's, among those of its record.
        """
        if isinstance(entry, Image.Image):
            return _encoded(entry, number)
        if isinstance(entry, dict) and entry.keys() <= {"bytes", "path"}:
            if entry.get("bytes") is not None:
                return _inline(field, entry["bytes"], number, entry.get("path"))
            entry = entry.get("path")
        if isinstance(entry, bytes):
            return _inline(field, entry, number)
        if isinstance(entry, str) and (found := _DATA.fullmatch(entry)):
            return _inline(field, _decoded(field, found.group(1)), number)
        return self._path(field, entry)

    def video(self, field: str, entry: Any) -> list[ImageSource]:
        """Return the frames of a video: a list of images, a folder of frames, or a file.

        Cause if there are none. ValueError, which no option skips, if a file cannot be read here.
        """
        if isinstance(entry, list):
            if not entry:
                raise Cause(f"field '{field}' holds a video without frames")
            return self._frames([self.image(field, frame, n) for n, frame in enumerate(entry)])
        if isinstance(entry, dict) and entry.keys() <= {"bytes", "path"}:
            if entry.get("bytes") is not None:
                raise Cause(f"field '{field}' holds the bytes of a video; save it as a file")
            entry = entry.get("path")
        path = self._path(field, entry)
        try:
            if path.is_dir():
                return self._frames([self._allowed(field, frame) for frame in _frames(path)])
            if not path.is_file():
                raise Cause(f"video {path} is neither a folder of frames nor a file")
        except OSError as error:
            raise Cause(unusable_name(path, error)) from error
        return self._frames_of_file(path)

    def _frames(self, frames: Sequence[Path | InlineImage]) -> list[ImageSource]:
        return [Video(tuple(frames))] if self.video_frames == "whole" else list(frames)

    def _frames_of_file(self, path: Path) -> list[ImageSource]:
        if self.video_frames is None:
            raise ValueError(
                f"data.video_frames=null: video {path} is a file; set the number of frames to take "
                "from each, or give folders of frames"
            )
        require_av(path)
        if self.video_frames == "whole":
            return [Video(path)]
        return [VideoFrame(path, number, self.video_frames) for number in range(self.video_frames)]

    def _path(self, field: str, entry: Any) -> Path:
        if not isinstance(entry, str) or not entry:
            raise Cause(f"field '{field}' holds {shortened(entry)}, not a file name")
        if found := _SCHEME.match(entry):
            if found.group(1).lower() != "file":
                raise Cause(
                    f"field '{field}' holds {shortened(entry)}; nothing is downloaded: save it and "
                    "name the file"
                )
            entry = entry[found.end() :]
        return self._allowed(field, self.root / entry)

    def _allowed(self, field: str, path: Path) -> Path:
        if self.inside_root and not path.resolve().is_relative_to(self.root.resolve()):
            raise Cause(
                f"field '{field}' names {path}, which lies outside of {self.root}, as "
                "data.inside_root=true refuses; move it there, or set data.image_root"
            )
        return path


def listed(raw: dict[str, Any], one: str, several: str) -> list[Any]:
    """Return the entries of two fields of which one may be used, each with one entry or a list."""
    if _entries(raw, one) and _entries(raw, several):
        raise Cause(f"has both '{one}' and '{several}'; use one of them")
    return _entries(raw, one) + _entries(raw, several)


def _entries(raw: dict[str, Any], field: str) -> list[Any]:
    entries = raw.get(field)
    if entries is None:
        return []
    return entries if isinstance(entries, list) else [entries]


def _inline(field: str, content: Any, number: int, name: Any = None) -> InlineImage:
    if not isinstance(content, bytes):
        raise Cause(f"field '{field}' holds bytes of type {type(content).__name__}")
    return InlineImage(
        content, name if isinstance(name, str) and name else f"{number} in '{field}'"
    )


def _decoded(field: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise Cause(f"field '{field}' holds data that is not base64 ({error})") from error


def _encoded(image: Image.Image, number: int) -> InlineImage:
    """Return a picture of Pillow as a file without loss, as it is shown."""
    if image.mode not in MODES:
        raise Cause(f"has an image with pixels of mode {image.mode}; make it 8-bit grey or RGB")
    buffer = BytesIO()
    as_shown(image).save(buffer, format="PNG", compress_level=1)
    return InlineImage(buffer.getvalue(), f"{number} of Pillow")


def _frames(folder: Path) -> Sequence[Path]:
    """Return the frames in a folder. A name that begins with a dot is no frame's."""
    frames = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in FRAME_SUFFIXES and not path.name.startswith(".")
    ]
    if not frames:
        raise Cause(f"video folder {folder} holds no frames ({', '.join(sorted(FRAME_SUFFIXES))})")
    return sorted(frames, key=_by_numbers)


def _by_numbers(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Return a sort key under which 2 is before 10: digits compare as numbers, the rest as text."""
    parts = re.findall(r"[0-9]+|[^0-9]+", path.name)
    numbers = [(int(part), "") if part[0] in "0123456789" else (-1, part) for part in parts]
    return numbers, path.name
