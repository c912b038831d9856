"""Every impossible value is refused by name, and shares of steps are turned into steps."""

from __future__ import annotations

import dataclasses
import logging
import math

import pytest

from regate_ds.algorithm.executions.backward_only import BackwardOnly
from regate_ds.algorithm.executions.elide import Elide
from regate_ds.algorithm.executions.elide_images import ElideImages
from regate_ds.algorithm.executions.mlp_only import MlpOnly
from regate_ds.algorithm.executions.random_ltd import RandomLtd
from regate_ds.algorithm.executions.table import EXECUTIONS
from regate_ds.algorithm.executions.weighted import Weighted
from regate_ds.algorithm.quotas.per_window import PerWindow
from regate_ds.algorithm.quotas.table import QUOTAS
from regate_ds.algorithm.quotas.threshold import Threshold
from regate_ds.algorithm.rankings.attention import AttentionOrder
from regate_ds.algorithm.rankings.mixed import MixedOrder
from regate_ds.algorithm.rankings.random import RandomOrder
from regate_ds.algorithm.rankings.table import RANKINGS
from regate_ds.algorithm.schedule import MovingShare
from regate_ds.algorithm.scores.difficulty import DifficultyOnly
from regate_ds.algorithm.scores.excess_loss import ExcessLoss
from regate_ds.algorithm.scores.fused import Fused
from regate_ds.algorithm.scores.random import Random
from regate_ds.algorithm.scores.table import SCORES
from regate_ds.config import RegateConfig
from regate_ds.images_config import ImagesConfig
from regate_ds.merge_config import MergeConfig
from regate_ds.schedule_config import ScheduleConfig
from regate_ds.settings.section import plain_values, read_section
from tests.support.planning import config_of

DRAWS = {"execution": RandomLtd(), "score": Random()}
HALF_OF_IMAGES = ImagesConfig(keep_share=0.5)

REFUSED = [
    (RegateConfig, {"enabled": "yes"}, "must be true or false"),
    (RegateConfig, {"enabled": 1}, "must be true or false"),
    (RegateConfig, {"keep_share": 0.0}, r"must be in \[1e-6, 1\]"),
    (RegateConfig, {"keep_share": 1.5}, r"must be in \[1e-6, 1\]"),
    (RegateConfig, {"keep_share": math.nan}, "must be a number"),
    (RegateConfig, {"keep_share": "half"}, "must be a number, or a MovingShare"),
    (RegateConfig, {"keep_share": ((0.0, 0.7), (1.0, 0.3))}, "must be a number, or a MovingShare"),
    (RegateConfig, {"keep_share": True}, "must be a number"),
    (RegateConfig, {"first_layer": -1}, "must be 0 or more"),
    (RegateConfig, {"first_layer": None}, "must be a whole number"),
    (RegateConfig, {"last_layer": 1}, "must be above first_layer=1, or null"),
    (RegateConfig, {"last_layer": "end"}, "must be a whole number"),
    (RegateConfig, {"token_multiple": 0}, "must be at least 1"),
    (RegateConfig, {"score": "fused"}, "must be one of Fused, Random"),
    (RegateConfig, {"quota": None}, "must be one of PerSample, PerWindow, Threshold"),
    (RegateConfig, {"execution": Fused()}, "must be one of Elide, ElideImages, LossOnly,"),
    (
        RegateConfig,
        {"score": Fused(), "execution": RandomLtd()},
        "reads a store, but execution=random_ltd ranks",
    ),
    (RegateConfig, {"images": HALF_OF_IMAGES, **DRAWS}, "keep_share is below 1, but execution="),
    (RegateConfig, {"last_layer": None, **DRAWS}, "must be a number with execution=random_ltd"),
    (RandomLtd, {"seed": 1.5}, "must be a whole number"),
    (BackwardOnly, {"align": "next"}, "must be one of .*'predictor', 'target', 'both'"),
    (RegateConfig, {"schedule": 3}, "must be a ScheduleConfig"),
    (RegateConfig, {"images": 0.5}, r"must be an ImagesConfig; write ImagesConfig\(...\)"),
    (ImagesConfig, {"fill_rows": 1}, "must be true or false"),
    (ImagesConfig, {"keep_share": 0.0}, r"must be in \[1e-6, 1\]"),
    (ImagesConfig, {"keep_share": "half"}, "must be a number, or a MovingShare"),
    (ImagesConfig, {"ranking": "random"}, "must be one of RandomOrder, StrideOrder, PixelOrder"),
    (ImagesConfig, {"schedule": 3}, "must be a ScheduleConfig, or None"),
    (RegateConfig, {"merge": 4}, r"must be a MergeConfig; write MergeConfig\(...\)"),
    (MergeConfig, {"size": 1}, "must be at least 2; to merge nothing set merge.steps=0"),
    (MergeConfig, {"size": 2.5}, "must be a whole number"),
    (MergeConfig, {"steps": -1}, "must be 0 or more"),
    (MergeConfig, {"steps": 1.5}, "must be a whole number of steps, or a share below 1"),
    (MovingShare, {"between": "curve", "points": ((0.0, 0.7), (1.0, 0.3))}, "must be one of"),
    (MovingShare, {"points": 0.5}, "must be two pairs of numbers or more"),
    (MovingShare, {"points": ((0.0, 0.5),)}, "must be two pairs of numbers or more"),
    (MovingShare, {"points": (0.7, 0.3)}, "must be two pairs of numbers or more"),
    (MovingShare, {"points": ((0.0, 0.7), (1.0, "low"))}, "must be two pairs of numbers or more"),
    (MovingShare, {"points": ((0.0, 0.7), (1.0, math.nan))}, "must be two pairs of numbers or"),
    (MovingShare, {"points": ((0.0, 0.7, 1), (1.0, 0.3))}, "must be two pairs of numbers or more"),
    (MovingShare, {"points": ((0.1, 0.7), (1.0, 0.3))}, "places must rise from 0.0 to 1.0"),
    (MovingShare, {"points": ((0.0, 0.7), (0.0, 0.3))}, "places must rise from 0.0 to 1.0"),
    (MovingShare, {"points": ((0.0, 0.7), (1.1, 0.3))}, "places must rise from 0.0 to 1.0"),
    (MovingShare, {"points": ((0.0, 0.7), (1.0, 0.0))}, r"shares must be in \[1e-6, 1\]"),
    (MovingShare, {"points": ((0.0, 1.2), (1.0, 0.3))}, r"shares must be in \[1e-6, 1\]"),
    (RandomOrder, {"seed": "a"}, "must be a whole number"),
    (AttentionOrder, {"contribution_share": -0.1}, r"must be in \[0, 1\]"),
    (MixedOrder, {"by": "stride"}, "must be one of .*'pixels', 'diversity', 'attention'"),
    (MixedOrder, {"by": ["pixels"]}, "must be one of .*'pixels', 'diversity', 'attention'"),
    (MixedOrder, {"ranked_share": 1.1}, r"must be in \[0, 1\]"),
    (MixedOrder, {"seed": None}, "must be a whole number"),
    (Elide, {"align": "next"}, "must be one of .*'predictor', 'target', 'both'"),
    (MlpOnly, {"align": "next"}, "must be one of .*'predictor', 'target', 'both'"),
    (Weighted, {"low": 0.0}, "must be above 0"),
    (Weighted, {"high": 0.5}, "must be low=1.0 or more"),
    (RegateConfig, {"keep_share": 0.5, "execution": Weighted()}, "execution=weighted gives every"),
    (RegateConfig, {"execution": ElideImages()}, "keeps every answer in the layers, and images.k"),
    (Fused, {"fusion": "sum"}, "must be one of .*'additive', 'convex'"),
    (Fused, {"reference_weight": -0.1}, "must be 0 or more"),
    (Fused, {"reference_weight": math.inf}, "must be a number"),
    (Fused, {"reference_weight": 1.1, "fusion": "convex"}, r"must be in \[0, 1\] with fusion"),
    (Fused, {"decay": 1.0}, r"must be in \[0, 1\)"),
    (Fused, {"decay": -0.1}, r"must be in \[0, 1\)"),
    (Random, {"seed": 1.5}, "must be a whole number"),
    (ExcessLoss, {"reference": "gain"}, "must be one of .*'text', 'student'"),
    (DifficultyOnly, {"decay": 1.0}, r"must be in \[0, 1\)"),
    (DifficultyOnly, {"decay": "slow"}, "must be a number"),
    (PerWindow, {"floor": 1.1}, r"must be in \[0, 1\]"),
    (Threshold, {"gain": 0.0}, "must be above 0"),
    (ScheduleConfig, {"total_steps": 0}, "must be at least 1"),
    (ScheduleConfig, {"total_steps": 10.0}, "must be a whole number"),
    (ScheduleConfig, {"total_steps": True}, "must be a whole number"),
    (ScheduleConfig, {"warmup": -1}, "must be 0 or more"),
    (ScheduleConfig, {"warmup": 1.5}, "must be a whole number of steps, or a share below 1"),
    (ScheduleConfig, {"warmup": math.inf}, "must be a number"),
    (ScheduleConfig, {"cycle_steps": -1}, "must be 0 or more"),
    (ScheduleConfig, {"cycle_dense_steps": 3}, "must be between 0 and cycle_steps=0"),
    (ScheduleConfig, {"cycle_dense_steps": -1, "cycle_steps": 4}, "must be between 0 and"),
    (ScheduleConfig, {"final_dense_share": 2.0}, r"must be in \[0, 1\]"),
    (ScheduleConfig, {"final_dense_share": -0.1}, r"must be in \[0, 1\]"),
]


@pytest.mark.parametrize(("kind", "knobs", "problem"), REFUSED)
def test_an_impossible_value_is_refused_by_name(kind: type, knobs: dict, problem: str):
    name = next(iter(knobs))
    with pytest.raises(ValueError, match=f"^{name}=.*{problem}"):
        kind(**knobs)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: Fused(decay="0.5"), "decay='0.5': must be a number"),  # type: ignore[arg-type]
        (lambda: Threshold(gain=None), "gain=None: must be a number"),  # type: ignore[arg-type]
        (lambda: PerWindow(floor="a"), "floor='a': must be a number"),  # type: ignore[arg-type]
    ],
)
def test_a_knob_of_a_wrong_type_is_refused_before_its_range(make, problem: str):
    with pytest.raises(ValueError, match=problem):
        make()


@pytest.mark.parametrize("name", [["fused"], {"fused": {"decay": 0.5}}, None])
def test_what_is_no_name_of_a_method_is_refused(name):
    with pytest.raises(ValueError, match=r"^score=.*: must be one of fused, random"):
        read_section(RegateConfig, {"score": name}, where="")


@pytest.mark.parametrize("section", [5, "additive", [1]])
def test_an_older_key_does_not_hide_what_stands_where_its_section_belongs(section):
    with pytest.raises(ValueError, match=r"^schedule=.*: must hold keys; write warmup there"):
        read_section(RegateConfig, {"schedule": section, "warmup": 3}, where="")


def test_every_knob_has_a_refusal():
    kinds = {RegateConfig, ScheduleConfig, ImagesConfig, MergeConfig, MovingShare}
    for table in (SCORES, QUOTAS, EXECUTIONS, RANKINGS):
        kinds |= set(table.values())
    judged = {f"{kind.__name__}.{next(iter(knobs))}" for kind, knobs, _ in REFUSED}
    knobs = {f"{kind.__name__}.{f.name}" for kind in kinds for f in dataclasses.fields(kind)}
    assert knobs <= judged, f"add a line to REFUSED for each of {sorted(knobs - judged)}"
    assert judged <= knobs, f"take out of REFUSED {sorted(judged - knobs)}: no such knobs"


@pytest.mark.parametrize(
    "made",
    [
        lambda: RegateConfig(keep_share=1),
        lambda: RegateConfig(keep_share=1e-6),
        lambda: RegateConfig(first_layer=0, last_layer=1),
        lambda: Fused(reference_weight=3),
        lambda: Fused(reference_weight=1.0, fusion="convex"),
        lambda: Fused(decay=0),
        lambda: ScheduleConfig(cycle_steps=4, cycle_dense_steps=4),
        lambda: ScheduleConfig(final_dense_share=1.0),
    ],
)
def test_values_at_the_edge_are_allowed(made):
    made()


def test_a_method_is_named_in_a_file_with_its_knobs_under_its_name():
    values = {"score": "random", "random": {"seed": 3}, "quota": "per_window"}
    config = read_section(RegateConfig, values, where="elision")
    assert (config.score, config.quota) == (Random(seed=3), PerWindow())
    assert read_section(RegateConfig, plain_values(config), where="elision") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"score": "rnd"}, "elision.score='rnd': must be one of fused, random"),
        ({"fused": {"decay": 2}}, "elision.fused.decay=2: must be in"),
        ({"random": {"sed": 2}}, "elision.random.sed=2: unknown key; did you mean"),
        ({"per_window": 3}, "elision.per_window=3: must hold keys"),
        ({"decay": 0.5, "fused": {"decay": 0.4}}, "elision.decay=0.5: .* leave elision.decay out"),
    ],
)
def test_a_file_with_a_wrong_method_is_refused_by_its_key(values: dict, message: str):
    with pytest.raises(ValueError, match=message):
        read_section(RegateConfig, values, where="elision")


def test_older_keys_are_read_where_they_stand_now_and_each_says_so(caplog):
    old = {"total_steps": 9, "warmup": 3, "fusion": "convex", "align": "both", "decay": 0.5}
    with caplog.at_level(logging.WARNING):
        config = read_section(RegateConfig, old, where="elision")
    assert config == RegateConfig(
        execution=Elide(align="both"),
        score=Fused(fusion="convex", decay=0.5),
        schedule=ScheduleConfig(total_steps=9, warmup=3),
    )
    lines = [record.getMessage() for record in caplog.records]
    assert lines[1] == "elision.warmup is written elision.schedule.warmup now"
    assert len(lines) == len(old)


@pytest.mark.parametrize(
    ("warmup", "steps"), [(0, 0), (0.05, 10), (0.999, 200), (1, 1), (1.0, 1), (100, 100)]
)
def test_the_warm_up_is_a_count_or_a_share_below_one(warmup: float, steps: int):
    assert config_of(warmup=warmup).schedule.in_steps(200).warmup_steps == steps


def test_the_final_dense_block_is_a_rounded_share():
    assert ScheduleConfig(final_dense_share=0.12).in_steps(99).final_dense_steps == 12


def test_shares_that_move_are_read_from_a_file_and_written_back():
    moves = {"points": [[0, 0.7], [1.0, 0.3]]}
    jumps = {"points": [[0.0, 0.5], [0.5, 1]], "between": "steps"}
    values = {"keep_share": moves, "images": {"keep_share": jumps}}
    config = read_section(RegateConfig, values, where="")
    assert config.keep_share == MovingShare(points=((0.0, 0.7), (1.0, 0.3)))
    assert config.images.keep_share == MovingShare(points=((0.0, 0.5), (0.5, 1.0)), between="steps")
    assert read_section(RegateConfig, plain_values(config), where="") == config
    with pytest.raises(ValueError, match=r"^keep_share\.points=.*: shares must be"):
        read_section(RegateConfig, {"keep_share": {"points": [[0, 2.0], [1, 0.3]]}}, where="")


@pytest.mark.parametrize(("points", "chooses"), [((1.0, 0.5), True), ((1.0, 1.0), False)])
def test_a_share_that_moves_chooses_if_it_is_below_one_somewhere(points, chooses: bool):
    share = MovingShare(points=tuple(zip((0.0, 1.0), points, strict=True)))
    assert RegateConfig(keep_share=share).chooses == chooses
    config = RegateConfig(keep_share=1.0, images=ImagesConfig(keep_share=share))
    assert config.chooses == config.chooses_images == chooses


def test_a_run_too_short_for_a_share_to_fall_below_one_elides_nothing():
    share = MovingShare(points=((0.0, 1.0), (0.9, 0.5)), between="steps")
    config = RegateConfig(
        keep_share=share, schedule=ScheduleConfig(warmup=0, final_dense_share=0.0)
    )
    assert set(config.never_sparse(1)) == {"schedule"}
    assert config.never_sparse(10) == {}


def test_an_unknown_knob_fails():
    with pytest.raises(TypeError, match="keep_rate"):
        RegateConfig(keep_rate=0.5)


def test_a_config_cannot_change_after_its_birth():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RegateConfig().keep_share = 0.1
