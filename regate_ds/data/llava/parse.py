"""Turn one raw record of a file into a checked one, or say what is wrong with it.

Images are opened here only to find the broken ones; the loader's workers decode them later.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from regate_ds.data.llava.images import image_fault, unusable_name
from regate_ds.data.llava.records import MARKER, Record, Turn

FRAME_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
"""Suffixes of the files in a video's folder that count as its frames."""

_SURROGATE = re.compile("[\ud800-\udfff]")
"""Finds half a character: JSON can write it ("\\ud83d"), tokenizers and terminals refuse it."""


class Cause(ValueError):
    """The reason why one record is bad; it becomes a SampleError or a BadRecord."""


def id_of(raw: Any) -> str | None:
    """Return what a raw record calls itself."""
    found = raw.get("id") if isinstance(raw, dict) else None
    return None if found is None else str(found)


class Parser:
    """Turns the raw records of one file into checked ones."""

    def __init__(self, source: Path, name: str, image_root: Path, verify_images: bool) -> None:
        self._source, self._name = source, name
        self._image_root, self._verify_images = image_root, verify_images

    def record(self, number: int, raw: Any) -> Record:
        """Return the checked record of that number in the file. A bad one raises its Cause."""
        if isinstance(raw, Cause):
            raise raw
        if not isinstance(raw, dict):
            raise Cause(f"is a {type(raw).__name__}, not an object")
        turns = _turns(raw)
        media = self._media(raw, MARKER.findall("\n".join(turn.question for turn in turns)))
        images = tuple(image for group in media for image in group)
        for image in images:
            if fault := image_fault(image, verify=self._verify_images):
                raise Cause(fault)
        return Record(
            key=(self._name, number),
            id=id_of(raw),
            images=images,
            images_per_marker=tuple(len(group) for group in media),
            turns=turns,
            source=self._source,
        )

    def _media(self, raw: dict[str, Any], markers: list[str]) -> list[list[Path]]:
        """Return the image files of each marker, in the order of the markers."""
        if _names(raw, "image") and _names(raw, "images"):
            raise Cause("has both 'image' and 'images'; use one of them")
        images = _names(raw, "image") + _names(raw, "images")
        videos = _names(raw, "video")
        for marker, names in (("<image>", images), ("<video>", videos)):
            if markers.count(marker) != len(names):
                raise Cause(
                    f"has {markers.count(marker)} {marker} in its questions "
                    f"for {len(names)} {marker.strip('<>')} entries"
                )
        next_image, next_video = iter(images), iter(videos)
        return [
            [self._image_root / next(next_image)]
            if marker == "<image>"
            else _frames(self._image_root / next(next_video))
            for marker in markers
        ]


def _names(raw: dict[str, Any], field: str) -> list[str]:
    """Return the file names in a field, which may hold one, several or (absent or null) none."""
    names = raw.get(field)
    if names is None:
        return []
    names = names if isinstance(names, list) else [names]
    for name in names:
        if not isinstance(name, str) or not name:
            raise Cause(f"field '{field}' holds {name!r}, not a file name")
    return names


def _frames(folder: Path) -> list[Path]:
    try:
        if not folder.is_dir():
            raise Cause(f"video {folder} is not a folder of frames")
        frames = [path for path in folder.iterdir() if path.suffix.lower() in FRAME_SUFFIXES]
    except OSError as error:
        raise Cause(unusable_name(folder, error)) from error
    if not frames:
        raise Cause(f"video folder {folder} holds no frames ({', '.join(sorted(FRAME_SUFFIXES))})")
    return sorted(frames, key=_by_numbers)


def _by_numbers(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Return a sort key under which 2 is before 10: digits compare as numbers, the rest as text."""
    parts = re.findall(r"[0-9]+|[^0-9]+", path.name)
    numbers = [(int(part), "") if part[0] in "0123456789" else (-1, part) for part in parts]
    return numbers, path.name


def _turns(raw: dict[str, Any]) -> tuple[Turn, ...]:
    """Return the pairs of question and answer, in order."""
    parts = raw.get("conversations")
    if not isinstance(parts, list) or not parts:
        raise Cause("has no list 'conversations'")
    for number, part in enumerate(parts):
        _check_part(number, part)
    if len(parts) % 2:
        raise Cause(f"its {len(parts)} turns do not pair up: every 'human' needs a 'gpt' after it")
    return tuple(
        _turn(2 * number, question, answer)
        for number, (question, answer) in enumerate(zip(parts[::2], parts[1::2]))
    )


def _check_part(number: int, part: Any) -> None:
    if not isinstance(part, dict) or "from" not in part or "value" not in part:
        raise Cause(f"turn {number} needs the fields 'from' and 'value'")
    if part["from"] not in ("human", "gpt"):
        raise Cause(f"turn {number} has the unknown role {part['from']!r}; known: 'human', 'gpt'")
    expected = ("human", "gpt")[number % 2]
    if part["from"] != expected:
        raise Cause(f"turn {number} is from {part['from']!r} where {expected!r} should speak")
    if not isinstance(part["value"], str):
        raise Cause(f"turn {number} has the value {part['value']!r}, not a text")
    if found := _SURROGATE.search(part["value"]):
        raise Cause(f"turn {number} holds {found.group()!r}, half of a character")


def _turn(number: int, question: dict[str, Any], answer: dict[str, Any]) -> Turn:
    text = answer["value"]
    if not text.strip():
        raise Cause(f"turn {number + 1} is an empty answer")
    if found := MARKER.search(text):
        raise Cause(f"turn {number + 1} is an answer that holds {found.group()}")
    spans = answer.get("gold_spans", [])
    if not isinstance(spans, list) or not all(_is_span(span, len(text)) for span in spans):
        raise Cause(
            f"turn {number + 1} has the gold_spans {spans!r}; expected [start, end) pairs "
            f"within its {len(text)} characters"
        )
    return Turn(question["value"], text, tuple((start, end) for start, end in spans))


def _is_span(span: Any, length: int) -> bool:
    if not isinstance(span, list) or len(span) != 2 or not all(type(x) is int for x in span):
        return False
    return 0 <= span[0] < span[1] <= length
