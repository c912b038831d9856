"""The tables of docs/configuration.md and docs/objectives.md, from the dataclasses.

``python -m tests.recipe.config.table_helper`` prints the first, to be pasted after a change; with
``pretrain`` behind it, the second.
"""

import ast
import inspect
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.pretrain.config import PretrainTree
from regate_ds.settings.section import plain_values

HEAD = "| key | value | default | meaning |\n| --- | --- | --- | --- |"


def rows(tree: type = RunConfig) -> Iterator[str]:
    """One table row for each key, in the order of the tree."""
    yield from _rows(tree, "")


def _rows(section: type, where: str) -> Iterator[str]:
    hints, meanings = get_type_hints(section), _meanings(section)
    choices = getattr(section, "CHOICES", {})
    for spec in fields(section):
        hint, name = hints[spec.name], f"{where}{spec.name}"
        meaning = " ".join(meanings.get(spec.name, "").split())
        if spec.name in choices:
            yield from _choice_rows(spec, choices[spec.name], where, meaning)
            continue
        parts = [kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)]
        if where and not (parts and hint is parts[0]):
            assert meaning, f"{name} has no docstring"
            yield f"| `{name}` | {_kind(hint)} | {_default(spec)} | {meaning} |"
        for part in parts:
            yield from _rows(part, f"{name}.")


def _choice_rows(
    spec: Field[Any], methods: Mapping[str, type], where: str, meaning: str
) -> Iterator[str]:
    """The row of a field that is given by a method's name, then the knobs of each method."""
    chosen = type(spec.default_factory())
    (default,) = (name for name, method in methods.items() if method is chosen)
    kinds = " or ".join(f"`{name}`" for name in methods)
    yield f"| `{where}{spec.name}` | {kinds} | `{default}` | {meaning} |"
    for name, method in methods.items():
        yield from _rows(method, f"{where}{name}.")


def _meanings(section: type) -> dict[str, str]:
    """The docstring under each field; a field of a base class has it there."""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__[:-1]):
        (body,) = (n.body for n in ast.parse(textwrap.dedent(inspect.getsource(base))).body)
        names: list[str] = []
        for node in body:
            if isinstance(node, ast.AnnAssign):
                names.append(node.target.id)
            elif isinstance(node, ast.Expr) and names:
                found.update(dict.fromkeys(names, node.value.value))
                names = []
            else:
                names = []
    return found


def _kind(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(kind) for kind in inner)
    if origin is Literal:
        return " or ".join(f"`{str(v).lower() if isinstance(v, bool) else v}`" for v in inner)
    if origin is tuple:
        return f"list of {_kind(inner[0])}" if inner[-1] is Ellipsis else f"{len(inner)} numbers"
    if is_dataclass(hint) or origin is dict:
        return "keys"
    names = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    return names.get(hint) or {Path: "path", type(None): "null"}[hint]


def _default(spec: Field[Any]) -> str:
    if spec.default is MISSING and spec.default_factory is MISSING:
        return "required"
    value = spec.default if spec.default is not MISSING else spec.default_factory()
    plain = plain_values(value)
    if plain is None or isinstance(plain, bool):
        return {None: "null", True: "true", False: "false"}[plain]
    needs_quotes = isinstance(plain, str) and (plain == "" or " " in plain)
    return f'`"{plain}"`' if needs_quotes else f"`{plain}`"


if __name__ == "__main__":
    print(HEAD, *rows(PretrainTree if sys.argv[1:] == ["pretrain"] else RunConfig), sep="\n")
