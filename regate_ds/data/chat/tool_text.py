"""Find out whether a chat template writes a record's tools: some leave them out without a word."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from regate_ds.data.llava.records import Record


def unwritten_tools(
    record: Record, head: str, whole: str, answers: Sequence[str | None]
) -> str | None:
    """Return what of a record's tools is missing in its text; None if nothing is.

    head: the text before the first answer. answers: the text of each answer that calls tools, None
        for the others.
    """
    for name in _names(json.loads(record.tools or "[]")):
        if not _is_in(name, head):
            return f"the tool {name!r}"
    for number, (turn, answer) in enumerate(zip(record.turns, answers), 1):
        for result in turn.results:
            content = json.loads(result)["content"].strip()
            if not _is_in(content, whole):
                return f"what tools return before answer {number}"
        for name in _names(json.loads(turn.calls)["tool_calls"] if turn.calls else ()):
            if answer is not None and not _is_in(name, answer):
                return f"the call of {name!r} in answer {number}"
    return None


def _names(tools: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for tool in tools:
        function = tool.get("function") or tool
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str):
            yield name


def _is_in(text: str, whole: str) -> bool:
    """Return whether a text was written, as it stands or within JSON."""
    return text in whole or json.dumps(text, ensure_ascii=False)[1:-1] in whole
