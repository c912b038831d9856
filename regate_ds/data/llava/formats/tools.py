"""Tools of a record: which there are, the calls of an answer, and what they return.

Templates write them as JSON, so they are kept as JSON: a record must not change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from regate_ds.data.llava.formats.said import says_something, shortened
from regate_ds.data.llava.records import Cause

RESULT_FIELDS = ("name", "tool_call_id")
"""Fields of a tool's turn beside its role and content."""

_AS_TEXT = "write them as one JSON text"


def tools_of(raw: Mapping[str, Any]) -> str | None:
    """Return the tools that a record offers, as JSON. Cause if they are none."""
    given = raw.get("tools")
    if not says_something(given):
        return None
    tools = _read("has the tools", given)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Cause(f"has the tools {shortened(given)}, not a list of objects")
    if tools is given and _holds_null(tools):
        # A table fills the fields of one object with those of the others.
        raise Cause(f"has tools that hold null, which a table may have put there; {_AS_TEXT}")
    return _written(tools)


def calls_of(number: int, part: Mapping[str, Any], text: str) -> str:
    """Return turn ``number``, which calls tools, as JSON. Cause if it is bad."""
    calls = part["tool_calls"]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Cause(f"turn {number} has the tool_calls {shortened(calls)}, not a list of objects")
    read = [_call(number, call) for call in calls]
    return _written({"role": "assistant", "content": text, "tool_calls": read})


def result_of(number: int, part: Mapping[str, Any], text: str) -> str:
    """Return turn ``number``, which is from a tool, as JSON."""
    more = {name: part[name] for name in RESULT_FIELDS if says_something(part.get(name))}
    if bad := [name for name, value in more.items() if not isinstance(value, str)]:
        raise Cause(f"turn {number} has {bad[0]}={shortened(more[bad[0]])}, not a text")
    return _written({"role": "tool", "content": text, **more})


def _call(number: int, call: dict[str, Any]) -> dict[str, Any]:
    """Return a call; its arguments become an object, which is what templates write."""
    function = call.get("function") or call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Cause(f"turn {number} has a tool call {shortened(call)} without a function's name")
    given = function.get("arguments") or {}
    where = f"turn {number} calls {function['name']} with the arguments"
    arguments = _read(where, given)
    if not isinstance(arguments, dict):
        raise Cause(f"{where} {shortened(given)}, not an object")
    if arguments is given and _holds_null(arguments):
        raise Cause(f"{where} {shortened(given)}, and a table may have put null there; {_AS_TEXT}")
    own = {"name": function["name"], "arguments": arguments}
    if function is call:
        return own
    kept = {name: call[name] for name in ("id", "type") if says_something(call.get(name))}
    return {**kept, "function": own}


def _read(where: str, given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        raise Cause(f"{where} {shortened(given)}, which is not JSON ({error})") from error


def _holds_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_null, value.values()))
    return any(map(_holds_null, value)) if isinstance(value, list) else value is None


def _written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
