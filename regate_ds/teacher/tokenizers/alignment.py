"""Which of the teacher's tokens a student's token covers, where the two cut one text differently.

A token is as wide as the characters that it stands for; what a tokenizer leaves between two tokens
(the space before a word, for many) belongs to the later one. A character that several tokens spell
together is shared by them evenly, in their order. A teacher's token is then shared out over the
student's tokens that it lies under, by length. So an answer's total stays what it was, and where
both tokenizers cut alike each token gets its own loss and nothing else.

Shapes: N label positions of the student's sample, M of the teacher's, E pairs that overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Span = tuple[int, int]
"""Start and end of a token in the characters of an answer."""

TurnSpan = tuple[int, int, int]
"""The turn of an answer, and a span in it; its last one, (turn, len, len), is the eos."""

Share = tuple[int, int, float]
"""A student's token, a teacher's token, and how much of the latter the former covers, up to 1."""


@dataclass(frozen=True)
class Alignment:
    """For each overlap of two tokens: their numbers among the labels, and the share."""

    student_E: Tensor
    teacher_E: Tensor
    share_E: Tensor
    num_student: int

    def share_out(self, losses_M: Tensor) -> Tensor:
        """fp32 [N]: the summed losses of what each of the student's tokens covers."""
        # In fp64, so that a share of 1 hands on every digit.
        parts_E = losses_M.double()[self.teacher_E] * self.share_E
        losses_N = torch.zeros(self.num_student, dtype=torch.float64)
        return losses_N.index_add(0, self.student_E, parts_E).float()

    @property
    def num_teacher(self) -> int:
        """How many of the teacher's labels, from the first on, have any part in it."""
        return int(self.teacher_E.max()) + 1 if self.teacher_E.numel() else 0


def align(
    student: Sequence[TurnSpan], teacher: Sequence[TurnSpan], *, num_student: int
) -> Alignment:
    """Align whole samples, then keep the student's first ``num_student`` labels.

    Both have the same turns, each with its eos at the end.
    """
    shares: list[Share] = []
    s, t = 0, 0
    for mine, theirs in zip(_turns(student), _turns(teacher), strict=True):
        shares += [(s + i, t + j, share) for i, j, share in _align_turn(mine, theirs)]
        s, t = s + len(mine), t + len(theirs)
    kept = [share for share in shares if share[0] < num_student]
    mine_E, theirs_E, share_E = zip(*kept) if kept else ((), (), ())
    return Alignment(
        torch.tensor(mine_E, dtype=torch.int64),
        torch.tensor(theirs_E, dtype=torch.int64),
        torch.tensor(share_E, dtype=torch.float64),
        num_student,
    )


def _align_turn(student: Sequence[Span], teacher: Sequence[Span]) -> Iterator[Share]:
    """Text by its characters, and the eos with the eos."""
    (*mine, (num_chars, _)), (*theirs, _) = student, teacher
    if mine:
        yield from align_text(edges(mine, num_chars), edges(theirs, num_chars))
    else:
        # A text that is nothing to the student's tokenizer: its eos answers for all of it.
        yield from ((0, j, 1.0) for j in range(len(theirs)))
    yield len(mine), len(theirs), 1.0


def edges(spans: Sequence[Span], num_chars: int) -> list[float]:
    """Where each token begins, and the last one ends, in characters; they leave no gap."""
    touching = [0] * num_chars
    for start, end in spans:
        for char in range(start, end):
            touching[char] += 1
    found, done = [0.0], 0
    for start, end in spans:
        gap = max(0, start - done)
        found.append(found[-1] + gap + sum(1.0 / touching[char] for char in range(start, end)))
        done = max(done, end)
    found[-1] += num_chars - done if spans else 0
    return found


def align_text(student: Sequence[float], teacher: Sequence[float]) -> Iterator[Share]:
    """The overlaps of the tokens between two lists of edges over the same characters."""
    last = len(student) - 2
    if list(student) == list(teacher):
        # Also of tokens without any width.
        yield from ((i, i, 1.0) for i in range(last + 1))
        return
    i = 0
    for j, (start, end) in enumerate(zip(teacher, teacher[1:])):
        while i < last and student[i + 1] <= start:
            i += 1
        covered = [
            (k, min(end, student[k + 1]) - max(start, student[k]))
            for k in _while_before(student, i, end)
        ]
        whole = sum(width for _, width in covered if width > 0)
        if whole == 0:
            # No width of its own: it goes to the student's token that begins or goes on here.
            yield i, j, 1.0
            continue
        yield from ((k, j, width / whole) for k, width in covered if width > 0)


def _while_before(edges: Sequence[float], first: int, end: float) -> Iterator[int]:
    k = first
    while k < len(edges) - 1 and edges[k] < end:
        yield k
        k += 1


def _turns(spans: Sequence[TurnSpan]) -> list[list[Span]]:
    """The spans of each turn, in order."""
    found: dict[int, list[Span]] = {}
    for turn, start, end in spans:
        found.setdefault(turn, []).append((start, end))
    return [found[turn] for turn in sorted(found)]
