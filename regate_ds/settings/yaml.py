"""Read YAML as its author means it: 2e-5 is a number, and a key that stands twice is an error."""

from __future__ import annotations

import re
from typing import Any

import yaml


def read_yaml(text: str) -> Any:
    """Return the plain values of one YAML document. ValueError, in one line, if it is not YAML."""
    try:
        # _Reader is a safe loader: it builds plain values only.
        return yaml.load(text, Loader=_Reader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


class _Reader(yaml.SafeLoader):
    pass


def _unique_keys(reader: _Reader, node: yaml.MappingNode) -> dict[Any, Any]:
    """Build a mapping and refuse equal keys, of which PyYAML itself would take the last."""
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(
                problem="a key must be a single value; text with { or [ needs quotes",
                problem_mark=key.start_mark,
            )
        if key.value in seen:
            raise yaml.constructor.ConstructorError(
                problem=f"key {key.value!r} stands twice; delete one", problem_mark=key.start_mark
            )
        seen.add(key.value)
    return reader.construct_mapping(node, deep=True)


_Reader.add_constructor("tag:yaml.org,2002:map", _unique_keys)
# YAML 1.1 wants a point and a sign in a float; without this resolver it reads 2e-5 as text.
_Reader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
