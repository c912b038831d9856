"""Read documents from plain text, and hold a part of them out by a hash of their words."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

By = Literal["line", "paragraph"]

SUFFIXES = (".txt", ".md", ".rst")
"""Of the files that are read in a folder; a file that is named itself may have any."""

_BETWEEN = {"line": re.compile(r"\n"), "paragraph": re.compile(r"\n\s*\n")}


def read_documents(path: Path, *, by: By = "line") -> list[str]:
    """Return the documents of a file, or of all text files below a folder in order of their names.

    by: a document is a line, or a paragraph between empty lines; white space in it becomes one
        space.

    ValueError if there is no such path, no text in it, or a file is not UTF-8.
    """
    if by not in _BETWEEN:
        raise ValueError(f"by={by!r}: must be one of {get_args(By)}")
    documents = [
        " ".join(part.split()) for file in _files(path) for part in _BETWEEN[by].split(_text(file))
    ]
    documents = [one for one in documents if one]
    if not documents:
        raise ValueError(f"{path}: holds no text; give a file or a folder that does")
    return documents


def hold_out(documents: Sequence[str], *, share: float) -> tuple[list[str], list[str]]:
    """Return the documents to train on and about ``share`` of them that are held out, in order.

    The words of a document alone decide, so that equal ones are on one side, whatever the rest is.
    ValueError if the share is not in (0, 1), or a side has no document.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share={share}: must be above 0 and below 1")
    sides: tuple[list[str], list[str]] = ([], [])
    for one in documents:
        number = int.from_bytes(hashlib.sha256(one.encode()).digest()[:8], "big")
        sides[number < share * 2**64].append(one)
    if not all(sides):
        raise ValueError(
            f"share={share} of {len(documents)} documents leaves {len(sides[0])} to train on and "
            f"{len(sides[1])} held out; give more text, or another share"
        )
    return sides


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; give one with plain text")
    files = sorted(one for one in path.rglob("*") if one.suffix in SUFFIXES and one.is_file())
    if not files:
        raise ValueError(f"{path}: has no file that ends in one of {SUFFIXES}; name a file itself")
    return files


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is not UTF-8 ({error}); convert it, or leave it out") from None
