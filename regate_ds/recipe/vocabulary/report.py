"""How many tokens a data set takes, by the old tokenizer and by the new one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from regate_ds.algorithm.batch import IGNORE
from regate_ds.data.llava.sample import EncodedSample

ALL = "all"


@dataclass
class TextCount:
    """Sums over the samples of a group; image positions are not counted."""

    samples: int = 0
    characters: int = 0
    """Of all texts between special tokens."""

    old_tokens: int = 0
    new_tokens: int = 0
    old_labels: int = 0
    """Tokens of answers, whose losses are learnt."""

    new_labels: int = 0

    def add(self, other: TextCount) -> None:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


def count_of(old: EncodedSample, new: EncodedSample, texts: Iterable[str]) -> TextCount:
    """Count one sample, encoded by both tokenizers."""
    return TextCount(
        1,
        sum(map(len, texts)),
        *(int((~sample.is_placeholder_S).sum()) for sample in (old, new)),
        *(int((sample.labels_S != IGNORE).sum()) for sample in (old, new)),
    )


def table_of(counts: dict[str, TextCount]) -> list[str]:
    """Return the lines of a table with a row for each group."""
    head = ("", "samples", "tokens", "(before)", "saved", "characters a token", "(before)")
    rows: list[Sequence[Any]] = [(*head, "labels", "(before)")]
    for name, one in counts.items():
        rows.append(
            (
                *(name, one.samples, one.new_tokens, one.old_tokens),
                f"{1 - one.new_tokens / one.old_tokens:.3f}",
                *(f"{one.characters / n:.2f}" for n in (one.new_tokens, one.old_tokens)),
                *(one.new_labels, one.old_labels),
            )
        )
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{v!s:>{w}}" for v, w in zip(row, widths, strict=True)) for row in rows]
