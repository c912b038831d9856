"""What encoders need to know of a tokenizer: its rules, and the texts of its special tokens."""

from __future__ import annotations

import json
import re
from typing import Any

from regate_ds.data.llava.records import MARKER, Record, bad_record, describe


def special_tokens(tokenizer: Any, *more: str) -> re.Pattern[str]:
    """Return a pattern that finds the tokenizer's special tokens, and ``more``, in a text."""
    added = tokenizer.added_tokens_decoder.values()
    special = {*tokenizer.all_special_tokens, *(t.content for t in added if t.special), *more}
    # Longer ones first, and those of one length by their text: the pattern is a part of the name of
    # an index, and the order of a set differs from process to process.
    texts = map(re.escape, sorted(special, key=lambda text: (-len(text), text)))
    # Without any the pattern finds nothing, where an empty one would be found everywhere.
    return re.compile("|".join(texts) or "(?!)")


def rules_of(tokenizer: Any) -> str:
    """Return a tokenizer's rules as JSON, without padding and truncation, which its calls set."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({**rules, "padding": None, "truncation": None}, sort_keys=True)


def require_no_special(record: Record, special: re.Pattern[str]) -> None:
    """Refuse, by SampleError, text that the tokenizer would read as a special token."""
    texts = {"system text": record.system or "", "list of tools": record.tools or ""}
    for number, turn in enumerate(record.turns, 1):
        texts[f"question {number}"] = MARKER.sub("\n", turn.question)
        texts[f"answer {number}"] = turn.calls or turn.answer
        for result in turn.results:
            texts[f"question {number}"] += result
    for where, text in texts.items():
        if found := special.search(text):
            cause = f"its {where} holds {found.group()!r}, a special token's text"
            raise bad_record(describe(record, cause))
