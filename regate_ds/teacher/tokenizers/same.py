"""Check that a teacher can read the student's own token ids: tokens and merges must be the same."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from regate_ds.teacher.scoring import logger


def choose_pad_id(tokenizer: Any) -> int:
    """Return the token id that stands for images: the tokenizer's pad, or its eos without one.

    ValueError if the tokenizer has neither.
    """
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the teacher's {type(tokenizer).__name__} has neither a pad nor an eos token; set "
            "its pad_token, which stands for images"
        )
    logger.info("the teacher's tokenizer has no pad token: its eos token stands for images")
    return tokenizer.eos_token_id


def require_same_tokens(
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    placeholder_ids: Iterable[int],
    ids: Iterable[int] | None = None,
) -> None:
    """Refuse, by ``ValueError`` naming the first difference, a teacher with other token ids.

    ids: the ids that occur as text or label; None takes all ids of the student, except
    ``placeholder_ids`` and a padding token that is not the eos. Both tokenizers must be fast ones.
    """
    student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    checked = set(student.values()) if ids is None else set(ids)
    if ids is None and student_tokenizer.pad_token_id != student_tokenizer.eos_token_id:
        checked.discard(student_tokenizer.pad_token_id)
    student_token = {number: token for token, number in student.items()}
    teacher_token = {number: token for token, number in teacher.items()}
    for number in sorted(checked - set(placeholder_ids)):
        if student_token.get(number) != teacher_token.get(number):
            raise _misfit(
                f"token id {number} is {student_token.get(number)!r} for the student and "
                f"{teacher_token.get(number)!r} for the teacher"
            )
    _require_same_rules(_rules(student_tokenizer), _rules(teacher_tokenizer))


def _rules(tokenizer: Any) -> tuple[str, list[Any]]:
    """Return the kind of a fast tokenizer's model, and its merges (none for a kind without)."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer, whose merges cannot be compared; "
            "convert it to a fast one"
        )
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return model["type"], model.get("merges", [])


def _require_same_rules(student: tuple[str, list[Any]], teacher: tuple[str, list[Any]]) -> None:
    if student == teacher:
        return
    (student_kind, student_merges), (teacher_kind, teacher_merges) = student, teacher
    if student_kind != teacher_kind:
        raise _misfit(f"the student's is of kind {student_kind}, the teacher's {teacher_kind}")
    pairs = zip(student_merges, teacher_merges)
    different = (number for number, (one, other) in enumerate(pairs) if one != other)
    number = next(different, min(len(student_merges), len(teacher_merges)))
    raise _misfit(
        f"merge {number} is {_merge(student_merges, number)} for the student and "
        f"{_merge(teacher_merges, number)} for the teacher"
    )


def _merge(merges: list[Any], number: int) -> str:
    return repr(merges[number]) if number < len(merges) else "absent"


def _misfit(difference: str) -> ValueError:
    return ValueError(
        f"the teacher's tokenizer does not fit the student's: {difference}; use the student's own "
        "text backbone, a teacher with the same tokenizer, or teacher.tokenizer=own, which aligns "
        "the losses by characters"
    )
