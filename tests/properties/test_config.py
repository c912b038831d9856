"""A configuration is read as what it says, however it is written; anything else is told."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from regate_ds.recipe.config.tree import RunConfig, dump_config, load_config
from regate_ds.recipe.run_folder import leaves
from regate_ds.settings.section import plain_values
from tests.properties.values_helper import json_values, places

MINIMAL = {
    "data": {"train": "t.json"},
    "model": {"path": "student"},
    "run": {"out": "out"},
    "teacher": {"store": "store"},
}

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
counts = st.integers(1, 10**12)
shares = st.floats(1e-6, 1)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "data.name": texts.filter(bool),
    "data.max_length": st.integers(2, 10**9),
    "data.skip_bad": st.booleans(),
    "data.image_root": st.none() | st.sampled_from(["a b", "~x", "'q'", "# no comment", "null "]),
    "data.num_workers": st.integers(0, 99),
    "data.template.user": texts,
    "data.template.system": texts,
    "elision.keep_share": shares,
    "elision.fused.reference_weight": shares,
    "elision.schedule.warmup": st.floats(0, 0.5),
    "elision.token_multiple": counts,
    "elision.images.keep_share": shares,
    "model.freeze_vision": st.booleans(),
    "model.lora.rank": counts,
    "optimizer.lr": st.floats(1e-300, 1e300),
    "optimizer.betas": st.tuples(shares, shares).map(lambda b: [0.9 * x for x in b]),
    "optimizer.warmup_steps": st.floats(0, 0.99) | st.integers(0, 10**6),
    "optimizer.grad_clip": st.none() | st.floats(1e-9, 1e9),
    "rank.batch": counts,
    "run.steps": st.none() | st.integers(10**4, 10**9),
    "run.precision": st.sampled_from(["fp32", "bf16"]),
    "run.resume": st.sampled_from([True, False, "auto"]),
    "run.seed": st.integers(0, 2**63 - 1),
    "run.keep_checkpoints": st.none() | counts,
    "teacher.tokens_per_batch": counts,
}
"""Some keys, and values that each may have whatever the others are."""

settings_drawn = st.lists(st.sampled_from(sorted(VALUES)), unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: VALUES[name] for name in names})
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "run.yaml"


@pytest.fixture(scope="module")
def whole(path: Path) -> dict[str, Any]:
    """The tree of a run with all of its keys."""
    path.write_text(yaml.safe_dump(MINIMAL))
    return plain_values(load_config(path, ["data.template={}", "model.lora={}"]))


def put(tree: dict[str, Any], name: str, value: Any) -> None:
    *parents, key = name.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[key] = value


@st.composite
def spelt(draw: Any, value: Any) -> str:
    """Write a value in one line of YAML."""
    if isinstance(value, float) and draw(st.booleans()):
        return draw(st.sampled_from([f"{value:.17e}", f"{value:+.17E}", f"{value:.17g}"]))
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")


@given(data=st.data(), given_values=settings_drawn)
def test_each_key_has_the_value_that_was_written(
    data: st.DataObject, given_values: dict[str, Any], whole: dict[str, Any], path: Path
):
    tree, overrides = copy.deepcopy(MINIMAL), []
    for name, value in given_values.items():
        if data.draw(st.booleans()):
            overrides.append(f"{name}={data.draw(spelt(value))}")
        else:
            put(tree, name, value)
    is_flow = data.draw(st.booleans())
    path.write_text(yaml.safe_dump(tree, default_flow_style=is_flow), encoding="utf-8")
    config = load_config(path, overrides)
    found, default = (dict(leaves(plain_values(tree))) for tree in (config, whole))
    for name, value in given_values.items():
        assert found[name] == value, name
    for name in found.keys() & default.keys() - given_values.keys():
        assert found[name] == default[name], name
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def read(tree: dict[str, Any], path: Path) -> RunConfig | str:
    """Return the configuration of a tree, or what is said against it."""
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    try:
        return load_config(path)
    except ValueError as error:
        return str(error)


@given(data=st.data())
def test_with_any_value_anywhere_a_configuration_is_read_or_told_in_one_line(
    data: st.DataObject, whole: dict[str, Any], path: Path
):
    tree = copy.deepcopy(whole)
    container, key = data.draw(st.sampled_from(places(tree)))
    container[key] = data.draw(json_values)
    found = read(tree, path)
    if isinstance(found, str):
        assert found.startswith(f"{path}: ")
        assert len(found.splitlines()) == 1
    else:
        path.write_text(dump_config(found), encoding="utf-8")
        assert load_config(path) == found


FREE = ("model.text", "model.vision", "run.deepspeed")
"""Keys that hold another package's settings."""


@given(data=st.data(), unknown=st.text("abcdefgh_", min_size=1).map("zz_".__add__))
def test_an_unknown_key_is_told_by_its_name(
    data: st.DataObject, unknown: str, whole: dict[str, Any], path: Path
):
    tree = copy.deepcopy(whole)
    sections = [(tree, "")]
    for section, where in sections:
        inner = [(value, f"{where}{key}.") for key, value in section.items()]
        sections += [one for one in inner if isinstance(one[0], dict) and one[1][:-1] not in FREE]
    section, where = data.draw(st.sampled_from(sections))
    leaves_of = [k for k, v in section.items() if not isinstance(v, dict) and where + k not in FREE]
    if leaves_of and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(leaves_of))
        section[key] = {unknown: 1}
    else:
        key = unknown
        section[key] = data.draw(json_values)
    found = read(tree, path)
    assert isinstance(found, str)
    assert f"{where}{key}" in found
    assert len(found.splitlines()) == 1
