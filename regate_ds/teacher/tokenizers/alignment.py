"""Share the losses of the teacher's tokens out over the student's tokens of the same text.

The width of a token is its number of characters. Characters between two tokens (for many
tokenizers, the space before a word) belong to the later one. A character that several tokens spell
together is divided evenly between them, in their order. The loss of a teacher's token then goes to
the student's tokens that it overlaps, in proportion to the overlap. So the total of an answer stays
the same, and where both tokenizers cut a text alike, each token gets its own loss.

Shapes: N label positions of the student's sample, M of the teacher's, E pairs that overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CharRange = tuple[int, int]
"""Start and end of a token in the characters of an answer."""

TurnSpan = tuple[int, int, int]
"""Turn number of an answer, and a span in it; the last one, (turn, len, len), is the eos."""

Share = tuple[int, int, float]
"""A student's token, a teacher's token, and the share of the latter that the former gets (to 1)."""


@dataclass(frozen=True)
class Alignment:
    """The overlaps of tokens: for each, the two tokens' numbers among the labels, and the share."""

    student_E: Tensor
    teacher_E: Tensor
    share_E: Tensor
    num_student: int

    def share_out(self, losses_M: Tensor) -> Tensor:
        """Return fp32 [N]: for each student's token the sum of its shares of the losses [M]."""
        # In fp64, so that a share of 1 keeps every digit.
        parts_E = losses_M.double()[self.teacher_E] * self.share_E
        losses_N = torch.zeros(self.num_student, dtype=torch.float64)
        return losses_N.index_add(0, self.student_E, parts_E).float()

    @property
    def num_teacher(self) -> int:
        """Number of the teacher's labels up to the last one that has an overlap."""
        return int(self.teacher_E.max()) + 1 if self.teacher_E.numel() else 0


def align(
    student: Sequence[TurnSpan], teacher: Sequence[TurnSpan], *, num_student: int
) -> Alignment:
    """Align two complete samples, then keep the overlaps of the student's first ``num_student``
    labels.

    Both samples have the same turns, each with its eos at the end.
    """
    shares: list[Share] = []
    s, t = 0, 0
    for s_turn, t_turn in zip(_turns(student), _turns(teacher), strict=True):
        shares += [(s + i, t + j, share) for i, j, share in _align_turn(s_turn, t_turn)]
        s, t = s + len(s_turn), t + len(t_turn)
    kept = [share for share in shares if share[0] < num_student]
    student_E, teacher_E, share_E = zip(*kept) if kept else ((), (), ())
    return Alignment(
        torch.tensor(student_E, dtype=torch.int64),
        torch.tensor(teacher_E, dtype=torch.int64),
        torch.tensor(share_E, dtype=torch.float64),
        num_student,
    )


def _align_turn(student: Sequence[CharRange], teacher: Sequence[CharRange]) -> Iterator[Share]:
    """Align the text of one turn by its characters, and the eos with the eos."""
    (*s_text, (num_chars, _)), (*t_text, _) = student, teacher
    if s_text:
        yield from align_text(edges(s_text, num_chars), edges(t_text, num_chars))
    else:
        # The student's tokenizer makes no token of this text: the eos gets all of its loss.
        yield from ((0, j, 1.0) for j in range(len(t_text)))
    yield len(s_text), len(t_text), 1.0


def edges(spans: Sequence[CharRange], num_chars: int) -> list[float]:
    """Return the start of each token, and the end of the last, in characters, without gaps."""
    num_tokens_of = [0] * num_chars
    for start, end in spans:
        for char in range(start, end):
            num_tokens_of[char] += 1
    ends, covered = [0.0], 0
    for start, end in spans:
        gap = max(0, start - covered)
        ends.append(ends[-1] + gap + sum(1.0 / num_tokens_of[char] for char in range(start, end)))
        covered = max(covered, end)
    ends[-1] += num_chars - covered if spans else 0
    return ends


def align_text(student: Sequence[float], teacher: Sequence[float]) -> Iterator[Share]:
    """Yield the overlaps of tokens between two lists of edges over the same characters."""
    last = len(student) - 2
    if list(student) == list(teacher):
        # Equal edges pair the tokens one to one, those without width too.
        yield from ((i, i, 1.0) for i in range(last + 1))
        return
    i = 0
    for j, (start, end) in enumerate(zip(teacher, teacher[1:])):
        while i < last and student[i + 1] <= start:
            i += 1
        overlaps = [
            (k, min(end, student[k + 1]) - max(start, student[k]))
            for k in _while_before(student, i, end)
        ]
        total = sum(width for _, width in overlaps if width > 0)
        if total == 0:
            # A token without width goes to the student's token that begins or goes on here.
            yield i, j, 1.0
            continue
        yield from ((k, j, width / total) for k, width in overlaps if width > 0)


def _while_before(edges: Sequence[float], first: int, end: float) -> Iterator[int]:
    """Yield the numbers of the tokens, from ``first`` on, that start before ``end``."""
    k = first
    while k < len(edges) - 1 and edges[k] < end:
        yield k
        k += 1


def _turns(spans: Sequence[TurnSpan]) -> list[list[CharRange]]:
    """Return the spans of each turn, in order."""
    spans_of: dict[int, list[CharRange]] = {}
    for turn, start, end in spans:
        spans_of.setdefault(turn, []).append((start, end))
    return [spans_of[turn] for turn in sorted(spans_of)]
