"""Every impossible value is refused by name, and shares of steps are turned into steps."""

from __future__ import annotations

import dataclasses
import math

import pytest

from regate_ds.config import RegateConfig

REFUSED = [
    ({"enabled": "yes"}, "must be true or false"),
    ({"enabled": 1}, "must be true or false"),
    ({"total_steps": 0}, "must be at least 1"),
    ({"total_steps": 10.0}, "must be a whole number"),
    ({"total_steps": True}, "must be a whole number"),
    ({"total_steps": None}, "must be a whole number"),
    ({"keep_share": 0.0}, r"must be in \[1e-6, 1\]"),
    ({"keep_share": 1.5}, r"must be in \[1e-6, 1\]"),
    ({"keep_share": math.nan}, "must be a number"),
    ({"keep_share": "half"}, "must be a number"),
    ({"keep_share": True}, "must be a number"),
    ({"first_layer": -1}, "must be 0 or more"),
    ({"first_layer": None}, "must be a whole number"),
    ({"last_layer": 1}, "must be above first_layer=1, or null"),
    ({"last_layer": "end"}, "must be a whole number"),
    ({"align": "next"}, "must be one of .*'predictor', 'target', 'both'"),
    ({"fusion": "sum"}, "must be one of .*'additive', 'convex'"),
    ({"reference_weight": -0.1}, "must be 0 or more"),
    ({"reference_weight": math.inf}, "must be a number"),
    ({"reference_weight": 1.1, "fusion": "convex"}, r"must be in \[0, 1\] with fusion=convex"),
    ({"decay": 1.0}, r"must be in \[0, 1\)"),
    ({"decay": -0.1}, r"must be in \[0, 1\)"),
    ({"warmup": -1}, "must be 0 or more"),
    ({"warmup": 1.5}, "must be a whole number of steps, or a share below 1"),
    ({"warmup": math.inf}, "must be a number"),
    ({"cycle_steps": -1}, "must be 0 or more"),
    ({"cycle_dense_steps": 3}, "must be between 0 and cycle_steps=0"),
    ({"cycle_dense_steps": -1, "cycle_steps": 4}, "must be between 0 and cycle_steps=4"),
    ({"final_dense_share": 2.0}, r"must be in \[0, 1\]"),
    ({"final_dense_share": -0.1}, r"must be in \[0, 1\]"),
    ({"token_multiple": 0}, "must be at least 1"),
]


@pytest.mark.parametrize(("knobs", "problem"), REFUSED)
def test_an_impossible_value_is_refused_by_name(knobs: dict, problem: str):
    name = next(iter(knobs))
    with pytest.raises(ValueError, match=f"^{name}=.*{problem}"):
        RegateConfig(**{"total_steps": 10, **knobs})


def test_every_knob_has_a_refusal():
    assert {next(iter(knobs)) for knobs, _ in REFUSED} == {
        field.name for field in dataclasses.fields(RegateConfig)
    }


@pytest.mark.parametrize(
    "knobs",
    [
        {"total_steps": 1},
        {"keep_share": 1},
        {"keep_share": 1e-6},
        {"first_layer": 0, "last_layer": 1},
        {"reference_weight": 3},
        {"reference_weight": 1.0, "fusion": "convex"},
        {"decay": 0},
        {"cycle_steps": 4, "cycle_dense_steps": 4},
        {"final_dense_share": 1.0},
    ],
)
def test_values_at_the_edge_are_allowed(knobs: dict):
    config = RegateConfig(**{"total_steps": 10, **knobs})
    assert all(getattr(config, key) == value for key, value in knobs.items())


@pytest.mark.parametrize(
    ("warmup", "steps"), [(0, 0), (0.05, 10), (0.999, 200), (1, 1), (1.0, 1), (100, 100)]
)
def test_the_warm_up_is_a_count_or_a_share_below_one(warmup: float, steps: int):
    assert RegateConfig(total_steps=200, warmup=warmup).num_warmup_steps == steps


def test_the_final_dense_block_is_a_rounded_share():
    assert RegateConfig(total_steps=99, final_dense_share=0.12).num_final_dense_steps == 12


def test_an_unknown_knob_fails():
    with pytest.raises(TypeError, match="keep_rate"):
        RegateConfig(total_steps=10, keep_rate=0.5)


def test_a_config_cannot_change_after_its_birth():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RegateConfig(total_steps=10).keep_share = 0.1
