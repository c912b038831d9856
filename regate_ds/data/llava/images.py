"""Find faults of image files, without decoding them where their format allows that."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
"""Errors that Pillow raises for a file that it cannot read; a broken PNG is a SyntaxError."""

MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
"""Pillow's modes that convert to RGB in one way only; 16-bit and float pixels would need a choice.
"""

LONGEST_RATIO = 200
"""Largest ratio of an image's sides; beyond it, processors refuse the image or make a huge one."""

_TAIL_BYTES = 4096
_JPEG_END = b"\xff\xd9"


def load_rgb(path: Path) -> Image.Image:
    """Decode an image as the student sees it. One of IMAGE_ERRORS if the file is broken."""
    with Image.open(path) as image:
        return image.convert("RGB")


def image_fault(path: Path, *, verify: bool = True) -> str | None:
    """Return why the file cannot be used as an image; None if it can.

    verify: False only checks that the file exists.
    """
    try:
        if not path.is_file():
            return f"there is no image file {path}"
    except OSError as error:
        return unusable_name(path, error)
    if not verify:
        return None
    try:
        with Image.open(path) as image:
            fault = _unsuitable(image)
            if fault is None:
                _require_complete(image, path)
    except IMAGE_ERRORS as error:
        return f"image file {path} is broken ({error})"
    return None if fault is None else f"image file {path} {fault}"


def unusable_name(path: Path, error: OSError) -> str:
    """Describe why the file system cannot look a name up, as where it is too long."""
    name = path.name if len(path.name) <= 80 else f"{path.name[:40]}..."
    return f"file {name} cannot be looked up ({error.strerror})"


def _unsuitable(image: Image.Image) -> str | None:
    """Return what about the image's mode or size makes it unusable; None if nothing does."""
    if image.mode not in MODES:
        return f"has pixels of mode {image.mode}; save it as 8-bit grey or RGB"
    if max(image.size) > LONGEST_RATIO * min(image.size):
        width, height = image.size
        return f"is {width} x {height} pixels; one side may be {LONGEST_RATIO} times the other"
    return None


def _require_complete(image: Image.Image, path: Path) -> None:
    """Raise one of IMAGE_ERRORS if the file is cut off.

    A PNG has checksums, and a JPEG ends with a marker, unless something follows it; any other file
    is decoded.
    """
    if image.format == "PNG":
        image.verify()
    elif image.format not in ("JPEG", "MPO") or _JPEG_END not in _tail(path):
        image.load()


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-min(_TAIL_BYTES, path.stat().st_size), os.SEEK_END)
        return file.read()
