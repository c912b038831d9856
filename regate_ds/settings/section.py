"""Build a tree of frozen dataclasses from plain YAML values, and turn it back into plain values.

The annotations give the types: nested sections, Path, Literal, tuples, dicts and optional values.
A value of another type may be a mistake and is refused: true is not taken for 1, nor "4" for 4.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from regate_ds.algorithm.knobs import is_number

Section = TypeVar("Section")


def read_section(kind: type[Section], values: object, *, where: str) -> Section:
    """Make an object of the dataclass ``kind`` from ``values``.

    where: dotted name of this section, for messages. ValueError names the key, its value and what
    is allowed.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}={values!r}: must hold keys")
    prepare: Callable[..., Mapping[Any, Any]] = getattr(kind, "prepare", _as_given)
    values = prepare(values, where)
    hints = get_type_hints(kind)
    specs = {spec.name: spec for spec in fields(kind) if spec.init}  # pyright: ignore
    choices = _Choices.of(kind)
    for key in values:
        if key not in specs and key not in choices.methods:
            known = [*specs, *choices.methods]
            raise ValueError(f"{_join(where, key)}={values[key]!r}: {_unknown(key, known, where)}")
    for name, spec in specs.items():
        required = spec.default is MISSING and spec.default_factory is MISSING
        if required and name not in values:
            raise ValueError(f"{_join(where, name)} is missing; it has no default")
    own = {
        key: _read(hints[key], value, _join(where, key))
        for key, value in values.items()
        if key in specs and key not in choices.tables
    }
    chosen = choices.read(values, specs, where)
    try:
        return kind(**own, **chosen)
    except ValueError as error:
        raise ValueError(_join(where, str(error))) from None


class _Choices:
    """Fields whose value is one of several methods: a name in the file, with knobs beside it."""

    def __init__(self, tables: Mapping[str, Mapping[str, Any]]) -> None:
        self.tables = tables
        self.methods = {name: kind for table in tables.values() for name, kind in table.items()}

    @classmethod
    def of(cls, kind: Any) -> _Choices:
        return cls(getattr(kind, "CHOICES", {}))

    def read(
        self, values: Mapping[Any, Any], specs: Mapping[str, Any], where: str
    ) -> dict[str, Any]:
        """Return the chosen methods. Knobs of the others are judged as well, and stand ready."""
        made = {
            name: read_section(kind, _or_empty(values.get(name)), where=_join(where, name))
            for name, kind in self.methods.items()
        }
        chosen = {}
        for field, table in self.tables.items():
            default = self.name_of(field, specs[field].default_factory())
            name = values.get(field, default)
            if not isinstance(name, str) or name not in table:
                allowed = ", ".join(table)
                raise ValueError(f"{_join(where, field)}={name!r}: must be one of {allowed}")
            chosen[field] = made[name]
        return chosen

    def name_of(self, field: str, method: object) -> str:
        return next(name for name, kind in self.tables[field].items() if type(method) is kind)


def plain_values(value: Any) -> Any:
    """Turn dataclasses into dicts, paths into text and tuples into lists, for YAML and JSON."""
    if is_dataclass(value):
        return _plain_section(value)
    if isinstance(value, Mapping):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain_values(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _as_given(values: Mapping[Any, Any], _: str) -> Mapping[Any, Any]:
    return values


def _or_empty(values: object) -> object:
    return {} if values is None else values


def _plain_section(section: Any) -> dict[str, Any]:
    """Return a section's fields; a chosen method is its name, and its knobs under that name."""
    choices, values = _Choices.of(section), {}
    for spec in fields(section):
        value = getattr(section, spec.name)
        if spec.name not in choices.tables:
            values[spec.name] = plain_values(value)
            continue
        values[spec.name] = choices.name_of(spec.name, value)
        if knobs := plain_values(value):
            values[values[spec.name]] = knobs
    return values


def _read(hint: Any, value: object, where: str) -> Any:
    origin = get_origin(hint)
    if is_dataclass(hint):
        return read_section(hint, value, where=where)  # pyright: ignore
    if origin in (Union, types.UnionType):
        return _read_union(get_args(hint), value, where)
    if origin is Literal:
        return _read_choice(get_args(hint), value, where)
    if origin is tuple:
        return _read_tuple(get_args(hint), value, where)
    return _read_leaf(origin or hint, value, where)


def _read_union(kinds: tuple[Any, ...], value: object, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    mappings = [kind for kind in kinds if (get_origin(kind) or kind) is dict or is_dataclass(kind)]
    others = [kind for kind in kinds if kind not in mappings]
    use = mappings if isinstance(value, Mapping) and mappings else others or mappings
    return _read(use[0], value, where)


def _read_choice(allowed: tuple[Any, ...], value: object, where: str) -> Any:
    if any(value == choice and type(value) is type(choice) for choice in allowed):
        return value
    names = (str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in allowed)
    raise ValueError(f"{where}={value!r}: must be one of {', '.join(names)}")


def _read_tuple(kinds: tuple[Any, ...], value: object, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where}={value!r}: must be a list")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise ValueError(f"{where}={value!r}: must be a list of {len(kinds)} values")
    return tuple(_read(kind, item, where) for kind, item in zip(kinds, value, strict=True))


def _read_leaf(kind: Any, value: object, where: str) -> Any:
    accepts, make, meaning = _LEAVES[kind]
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise ValueError(f"{where}={value!r}: must be a number that 64 bits hold")
    if not accepts(value):
        raise ValueError(f"{where}={value!r}: must be {meaning}")
    return make(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_LEAVES: dict[Any, tuple[Callable[[object], bool], Callable[[Any], Any], str]] = {
    bool: (lambda v: isinstance(v, bool), bool, "true or false"),
    int: (_is_integer, int, "a whole number"),
    float: (is_number, lambda v: v, "a number"),
    str: (lambda v: isinstance(v, str), str, "text"),
    Path: (lambda v: isinstance(v, str | Path) and str(v) != "", Path, "a path"),
    dict: (lambda v: isinstance(v, Mapping), dict, "keys with values"),
}


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _unknown(key: object, known: Iterable[str], where: str) -> str:
    known = list(known)
    if not known:
        return f"unknown key; {where} has no keys"
    close = difflib.get_close_matches(str(key), known, n=1)
    if close:
        return f"unknown key; did you mean {_join(where, close[0])}?"
    return f"unknown key; known are {', '.join(known)}"
