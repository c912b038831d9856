"""What is wrong with an image file, found without decoding it wherever its format allows that."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
"""What Pillow raises for a file it cannot read; a broken PNG is a SyntaxError."""

MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
"""Pillow's modes that become RGB without a choice of ours, as 16-bit or float pixels would need."""

LONGEST_RATIO = 200
"""Of the sides of an image; beyond it processors refuse it, or make a picture of it without end."""

_TAIL_BYTES = 4096
_JPEG_END = b"\xff\xd9"


def image_fault(path: Path, *, verify: bool = True) -> str | None:
    """Why the file cannot be used as an image; None if it can. ``verify`` False: does it exist?"""
    try:
        if not path.is_file():
            return f"there is no image file {path}"
    except OSError as error:
        return unusable_name(path, error)
    if not verify:
        return None
    try:
        with Image.open(path) as image:
            fault = _unfit(image)
            if fault is None:
                _require_whole(image, path)
    except IMAGE_ERRORS as error:
        return f"image file {path} is broken ({error})"
    return None if fault is None else f"image file {path} {fault}"


def unusable_name(path: Path, error: OSError) -> str:
    """Why the file system does not even look a name up: it is too long, say."""
    name = path.name if len(path.name) <= 80 else f"{path.name[:40]}..."
    return f"file {name} cannot be looked up ({error.strerror})"


def _unfit(image: Image.Image) -> str | None:
    if image.mode not in MODES:
        return f"has pixels of mode {image.mode}; save it as 8-bit grey or RGB"
    if max(image.size) > LONGEST_RATIO * min(image.size):
        width, height = image.size
        return f"is {width} x {height} pixels; one side may be {LONGEST_RATIO} times the other"
    return None


def _require_whole(image: Image.Image, path: Path) -> None:
    """Raise one of IMAGE_ERRORS if the file is cut off. A PNG has checksums; a JPEG ends with a
    marker, unless something else follows; of all others only decoding tells."""
    if image.format == "PNG":
        image.verify()
    elif image.format not in ("JPEG", "MPO") or _JPEG_END not in _tail(path):
        image.load()


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-min(_TAIL_BYTES, path.stat().st_size), os.SEEK_END)
        return file.read()
