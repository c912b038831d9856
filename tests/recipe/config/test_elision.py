"""`elision`: methods by name with knobs of their own, a schedule, and keys of older files."""

import re
from collections.abc import Callable

import pytest
import yaml

from regate_ds.algorithm.executions.none import NoElision
from regate_ds.algorithm.quotas.per_window import PerWindow
from regate_ds.algorithm.quotas.threshold import Threshold
from regate_ds.algorithm.schedule import Schedule
from regate_ds.algorithm.scores.fused import Fused
from regate_ds.algorithm.scores.random import Random
from regate_ds.config import RegateConfig
from regate_ds.images_config import ImagesConfig
from regate_ds.recipe.config.length import judge_length
from regate_ds.recipe.config.tree import RunConfig, dump_config, load_config
from regate_ds.schedule_config import ScheduleConfig
from tests.house.test_docs import blocks
from tests.support.paths import ROOT

Load = Callable[..., RunConfig]


@pytest.fixture
def load(tmp_path) -> Load:
    """Read a small file with overrides."""
    sections = {
        "model": {"path": "student"},
        "data": {"train": "train.json"},
        "teacher": {"store": "reference"},
        "run": {"out": "runs/one"},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(sections))
    return lambda *overrides: load_config(path, overrides)


def test_the_papers_configuration_is_the_papers_setting():
    elision = load_config(ROOT / "configs" / "paper.yaml").elision
    paper = RegateConfig(
        score=Fused(fusion="additive", decay=0.9, reference_weight=0.5),
        keep_share=0.5,
        first_layer=0,
        schedule=ScheduleConfig(
            warmup=100, cycle_steps=128, cycle_dense_steps=16, final_dense_share=0.0
        ),
    )
    assert elision == paper
    assert elision.schedule.in_steps(1000) == Schedule(
        total_steps=1000,
        warmup_steps=100,
        cycle_steps=128,
        cycle_dense_steps=16,
        final_dense_steps=0,
    )


def test_the_recommended_configuration_takes_the_best_of_a_step_and_half_of_each_image():
    elision = load_config(ROOT / "configs" / "recommended.yaml").elision
    assert elision == RegateConfig(quota=PerWindow(), images=ImagesConfig(keep_share=0.5))


def test_a_method_is_chosen_by_name_and_has_its_own_knobs(load):
    elision = load(
        "elision.execution=none",
        "elision.score=random",
        "elision.quota=threshold",
        "elision.random.seed=3",
        "elision.threshold.gain=0.5",
    ).elision
    assert elision.execution == NoElision()
    assert elision.score == Random(seed=3)
    assert elision.quota == Threshold(gain=0.5)


def test_knobs_of_a_method_that_is_not_chosen_change_nothing(load):
    assert load("elision.threshold.gain=0.5").elision == load().elision


def test_older_keys_are_read_where_they_stand_now(load, caplog):
    older = load("elision.warmup=3", "elision.decay=0.8", "elision.align=both")
    newer = load(
        "elision.schedule.warmup=3",
        "elision.fused.decay=0.8",
        "elision.elide.align=both",
    )
    assert older == newer
    assert [record.getMessage() for record in caplog.records] == [
        "elision.warmup is written elision.schedule.warmup now",
        "elision.decay is written elision.fused.decay now",
        "elision.align is written elision.elide.align now",
    ]


def test_the_schedule_runs_over_the_run_unless_told_otherwise(load):
    assert load().elision.schedule.in_steps(40).total_steps == 40
    longer = load("elision.schedule.total_steps=50").elision.schedule
    assert longer.in_steps(40).total_steps == 50


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("elision.elide.align=left", "elision.elide.align='left': must be one of predictor, targ"),
        ("elision.align=left", "elision.elide.align='left': must be one of predictor, target"),
        ("elision.score=best", "elision.score='best': must be one of fused, random"),
        ("elision.random={sed: 1}", "elision.random.sed=1: unknown key; did you mean elision.rand"),
        ("elision.none={a: 1}", "elision.none.a=1: unknown key; elision.none has no keys"),
        ("elision.threshold.gain=0", "elision.threshold.gain=0: must be above 0"),
        ("elision.fused=3", "elision.fused=3: must hold keys"),
        ("elision.schedule=3", "elision.schedule=3: must hold keys"),
        ("elision.schedule.warm=1", "elision.schedule.warm=1: unknown key; did you mean elision.s"),
        ("elision.schedule.total_steps=0", "elision.schedule.total_steps=0: must be at least 1"),
        ("elision.schedule.total_steps=no", "elision.schedule.total_steps=False: must be a whole"),
        ("elision.total_steps=0", "elision.schedule.total_steps=0: must be at least 1"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_that_names_it(load, override, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        load(override)
    assert "\n" not in str(refusal.value)


def test_a_key_given_in_both_forms_is_refused(load):
    message = (
        "elision.warmup=3: elision.schedule.warmup=2 is given as well; leave elision.warmup out"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        load("elision.schedule.warmup=2", "elision.warmup=3")


def test_chosen_methods_are_read_back_as_they_were_written(load, tmp_path):
    config = load("elision.quota=threshold", "elision.threshold.gain=0.5", "elision.score=random")
    again = tmp_path / "config.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["total_steps=9"], "elision.schedule.total_steps=9: the run has 10 steps"),
        (
            ["warmup=10"],
            "by elision.schedule no step .* 10 is sparse: lower its warmup=10",
        ),
        (["final_dense_share=1"], "no step of the run's 10 is sparse"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused(load, overrides, message):
    overrides = [f"elision.schedule.{override}" for override in overrides]
    with pytest.raises(ValueError, match=message):
        load("run.steps=10", *overrides)
    with pytest.raises(ValueError, match=message):
        judge_length(load(*overrides).elision, 10)


def test_merged_steps_are_refused_where_figures_do_not_know_them(load):
    with pytest.raises(ValueError, match=r"elision.merge.steps=0.5: the figures of `regate train`"):
        load("run.steps=10", "elision.merge.steps=0.5")
    assert load("run.steps=10", "elision.merge.size=8").elision.merge.size == 8


@pytest.mark.parametrize("dense", ["elision.keep_share=1.0", "elision.execution=none"])
def test_a_dense_run_may_be_dense_throughout(load, dense):
    config = load("run.steps=10", "elision.schedule.warmup=10", dense)
    assert not config.elision.chooses


@pytest.mark.parametrize(
    "override",
    [
        "elision.keep_share=1.0",
        "elision.enabled=false",
        "elision.execution=none",
        "elision.score=random",
    ],
)
def test_a_run_that_ranks_nothing_by_the_teacher_needs_no_store(load, override):
    assert load().needs_teacher
    assert not load("teacher.store=null", override).needs_teacher


def test_the_page_on_images_says_the_same_in_python_and_in_a_file(load):
    (python, file) = (block for block, _ in blocks(ROOT / "docs/images.md") if "0.25" in block)
    made: dict[str, RegateConfig] = {}
    exec(python, made)
    images = yaml.safe_load(file)["elision"]["images"]
    overrides = [f"elision.images.{key}={value}" for key, value in images.items()]
    assert made["config"].images == load(*overrides).elision.images
    assert made["config"].chooses_images


def test_images_may_have_a_schedule_of_their_own(load):
    config = load("elision.images={keep_share: 0.5, schedule: {warmup: 3, final_dense_share: 0}}")
    schedules = config.elision.schedules(20)
    answers = [schedules.chooses_answers(step) for step in range(20)]
    images = [schedules.chooses_images(step) for step in range(20)]
    assert answers == [False] + [True] * 17 + [False] * 2
    assert images == [False] * 3 + [True] * 17
    assert [schedules.is_dense(step) for step in range(20)] == [True] + [False] * 19


def test_an_execution_that_moves_no_rows_cannot_elide_images(load):
    for execution in ("none", "mlp_only"):
        load("elision.images.keep_share=0.5", f"elision.execution={execution}")
    with pytest.raises(ValueError, match=r"execution=LossOnly\(\): moves no rows, so that images"):
        load("elision.images.keep_share=0.5", "elision.execution=loss_only")


def test_a_schedule_of_images_without_a_sparse_step_is_named(load):
    elision = load("elision.images={keep_share: 0.5, schedule: {warmup: 100}}").elision
    assert set(elision.never_sparse(10)) == {"images.schedule"}
    assert set(elision.never_sparse(1000)) == set()
    with pytest.raises(ValueError, match=r"by elision.images.schedule no step .* its warmup=100"):
        judge_length(elision, 10)
    both = load("elision.images.keep_share=0.5", "elision.schedule.warmup=100").elision
    assert set(both.never_sparse(10)) == {"schedule"}
