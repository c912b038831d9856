"""Read WordNet's glosses, real text with a real class each, as Debian's wordnet-base installs them.

The class is the lexicographer's file of the word: food, animal, verbs of motion, and so on.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

_PARTS = ("noun", "verb", "adj", "adv")


class Gloss(NamedTuple):
    """One meaning of a word."""

    text: str
    kind: int
    """Number of the lexicographer's file, 0 to 44."""


def read_glosses(folder: Path) -> list[Gloss]:
    """Read ``data.noun`` and its like in order. ValueError if one is missing or damaged."""
    found = []
    for part in _PARTS:
        path = folder / f"data.{part}"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [_gloss(line) for line in lines if not line.startswith("  ")]
        except (OSError, ValueError, IndexError) as error:
            raise ValueError(
                f"{path}: cannot be read as WordNet's ({error}); give the folder "
                "usr/share/wordnet of Debian's package wordnet-base"
            ) from None
    return found


def _gloss(line: str) -> Gloss:
    head, text = line.split(" | ", 1)
    return Gloss(" ".join(text.split()), int(head.split()[1]))
