"""Open, measure and decode images, upright; and find their faults, without decoding them where
their format allows that."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from regate_ds.data.llava.media import (
    ImageSource,
    InlineImage,
    PictureSource,
    Video,
    VideoFrame,
    by_file,
    pictures_alone,
)
from regate_ds.data.llava.records import Record, bad_record, describe
from regate_ds.data.llava.video import read_frames, video_size

IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
"""Errors that Pillow raises for a file that it cannot read; a broken PNG is a SyntaxError."""

MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
"""Pillow's modes that convert to RGB in one way only; 16-bit and float pixels would need a choice.
"""

LONGEST_RATIO = 200
"""Largest ratio of an image's sides; beyond it, processors refuse the image or make a huge one."""

_TAIL_BYTES = 4096
_JPEG_END = b"\xff\xd9"


_LYING = (5, 6, 7, 8)
"""EXIF orientations under which a picture's sides change places."""


def image_size(source: PictureSource) -> tuple[int, int]:
    """Return the (width, height) of an upright image. One of IMAGE_ERRORS if it is broken."""
    if isinstance(source, VideoFrame):
        return video_size(source.video)
    with _open(source) as image:
        width, height = image.size
        return (height, width) if _orientation(image) in _LYING else (width, height)


def load_rgb(source: PictureSource) -> Image.Image:
    """Decode an image for the student, by ``as_shown``. One of IMAGE_ERRORS if it is broken."""
    if isinstance(source, VideoFrame):
        return read_frames(source.video, [(source.number, source.of)])[0]
    with _open(source) as image:
        return as_shown(image, is_upright=_orientation(image) == 1)


def as_shown(image: Image.Image, *, is_upright: bool = False) -> Image.Image:
    """Return an image as a viewer shows it: upright, RGB, and on white where it is transparent.

    Pillow's own conversion would show the colour that lies under a transparent pixel, mostly black.
    """
    upright = image if is_upright else ImageOps.exif_transpose(image)
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    over = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")


def load_all(sources: Sequence[PictureSource]) -> list[Image.Image]:
    """Decode images in order; the frames of one video file at once."""
    images: list[Image.Image] = []
    for run in by_file(sources):
        frames = [source for source in run if isinstance(source, VideoFrame)]
        if frames:
            images += read_frames(frames[0].video, [(f.number, f.of) for f in frames])
        else:
            images += map(load_rgb, run)
    return images


def sizes_of(record: Record) -> Iterator[tuple[PictureSource, tuple[int, int]]]:
    """Yield each image of a record with its (width, height). SampleError if one is broken."""
    for run in by_file(pictures_alone(record.images)):
        try:
            size = image_size(run[0])
        except IMAGE_ERRORS as error:
            raise bad_record(describe(record, broken(run[0], error))) from error
        yield from ((source, size) for source in run)


def broken(source: ImageSource, error: Exception) -> str:
    """Describe an image or video that cannot be read, in the same words each time."""
    cause = f"{error}"
    if isinstance(error, UnidentifiedImageError):
        # Pillow names the place in memory of bytes that lie in a record.
        is_empty = isinstance(source, InlineImage) and not source.content
        cause = "it is empty" if is_empty else "it is of no format that Pillow knows"
    is_list = isinstance(source, Video) and not isinstance(source.source, Path)
    return f"{_kind(source)} {'' if is_list else 'file '}{source} is broken ({cause})"


def image_fault(source: PictureSource, *, verify: bool = True) -> str | None:
    """Return why an image cannot be used; None if it can.

    verify: False only checks that a file exists.
    """
    path = source.video if isinstance(source, VideoFrame) else source
    if isinstance(path, Path) and (fault := _missing(path, _kind(source))):
        return fault
    if not verify:
        return None
    try:
        fault = _fault_of_content(source)
    except IMAGE_ERRORS as error:
        return broken(source, error)
    return None if fault is None else f"{_kind(source)} file {source} {fault}"


def _kind(source: ImageSource) -> str:
    return "video" if isinstance(source, (Video, VideoFrame)) else "image"


def _missing(path: Path, kind: str) -> str | None:
    try:
        return None if path.is_file() else f"there is no {kind} file {path}"
    except OSError as error:
        return unusable_name(path, error)


def _fault_of_content(source: PictureSource) -> str | None:
    """Return what makes an image unusable. One of IMAGE_ERRORS if it is broken."""
    if isinstance(source, VideoFrame):
        return _unsuitable_size(video_size(source.video))
    with _open(source) as image:
        fault = _unsuitable(image)
        if fault is None:
            _require_complete(image, source)
    return fault


@contextmanager
def _open(source: Path | InlineImage) -> Iterator[Image.Image]:
    """Open an image for the block. OSError where a decoder of Pillow has errors of its own."""
    try:
        with Image.open(source if isinstance(source, Path) else BytesIO(source.content)) as image:
            yield image
    except (RuntimeError, struct.error) as error:
        raise OSError(str(error)) from error


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image that was just opened; 1 is upright.

    A TIFF is turned by Pillow itself. A PNG can say it after its pixels too; that is not read,
    because the size would then need all of them.
    """
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def unusable_name(path: Path, error: OSError) -> str:
    """Describe why the file system cannot look a name up, as where it is too long."""
    name = path.name if len(path.name) <= 80 else f"{path.name[:40]}..."
    return f"file {name} cannot be looked up ({error.strerror})"


def _unsuitable(image: Image.Image) -> str | None:
    """Return what about the image's mode or size makes it unusable; None if nothing does."""
    if image.mode not in MODES:
        return f"has pixels of mode {image.mode}; save it as 8-bit grey or RGB"
    return _unsuitable_size(image.size)


def _unsuitable_size(size: tuple[int, int]) -> str | None:
    if max(size) <= LONGEST_RATIO * min(size):
        return None
    width, height = size
    return f"is {width} x {height} pixels; one side may be {LONGEST_RATIO} times the other"


def _require_complete(image: Image.Image, source: Path | InlineImage) -> None:
    """Raise one of IMAGE_ERRORS if the file is cut off.

    A PNG has checksums, and a JPEG ends with a marker, unless something follows it; any other file
    is decoded.
    """
    if image.format == "PNG":
        image.verify()
    elif image.format not in ("JPEG", "MPO") or _JPEG_END not in _tail(source):
        image.load()


def _tail(source: Path | InlineImage) -> bytes:
    if isinstance(source, InlineImage):
        return source.content[-_TAIL_BYTES:]
    with source.open("rb") as file:
        file.seek(-min(_TAIL_BYTES, source.stat().st_size), os.SEEK_END)
        return file.read()
