"""An answer, and which of its words need the image."""

from __future__ import annotations

import string
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """A text and the [start, end) spans of its words that need the image."""

    text: str = ""
    gold_spans: tuple[tuple[int, int], ...] = ()

    def __add__(self, other: Answer) -> Answer:
        moved = tuple((a + len(self.text), b + len(self.text)) for a, b in other.gold_spans)
        return Answer(self.text + other.text, self.gold_spans + moved)


QuestionAnswer = tuple[str, Answer]
"""A question and its answer."""


def fill(template: str, given: dict[str, str], seen: dict[str, str]) -> Answer:
    """Fill in the fields of ``template``: gold from ``seen``, unless they are in ``given``."""
    answer = Answer()
    for literal, name, _, _ in string.Formatter().parse(template):
        answer += Answer(literal)
        if name is not None and name in given:
            answer += Answer(given[name])
        elif name is not None:
            answer += Answer(seen[name], ((0, len(seen[name])),))
    return answer
