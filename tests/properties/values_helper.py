"""Values of any kind that JSON and YAML can write."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=5),
    st.sampled_from([10**400, -(10**400), "", "\n", "auto", "1e3"]),
)

json_values = st.recursive(
    _leaves,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.text("ab_-", max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return each container within a value, with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    inner = [value[key] for key in keys if isinstance(value[key], (dict, list))]
    return [(value, key) for key in keys] + [place for each in inner for place in places(each)]
