"""Tables and points of a picture, from results that are made up, against numbers by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from regate_ds.recipe.learning.files import Arm, LearningTask, Round, RunKey
from regate_ds.recipe.learning.plot import plot_task, points_of
from regate_ds.recipe.learning.result import Result, require_one_student
from regate_ds.recipe.learning.run_round import Bench
from regate_ds.recipe.learning.table import Costs, arm_table, read_costs, time_lines

COSTS = Costs(
    {
        "dense": {"dense": 2.0, "sparse": None},
        "mine": {"dense": 2.0, "sparse": 1.0},
        "random": {"dense": 2.0, "sparse": 1.0},
    },
    {"dense": 0.0, "mine": 10.0, "random": 0.0},
)


def run(arm: str, seed: int, visual: float, *, fraction: float = 1.0, **other: Any):
    num_steps = round(100 * fraction)
    num_sparse = 0 if arm == "dense" else round(0.8 * num_steps)
    key = RunKey(task="t", part="dev", arm=arm, seed=seed, steps=100, fraction=fraction)
    values: dict[str, Any] = {
        "arm": arm,
        "seed": seed,
        "fraction": fraction,
        "digest": "",
        "student": "one",
        "date": "",
        "machine": "",
        "accuracy_visual": visual,
        "accuracy_plain": 0.9,
        "loss": 1.0,
        "num_words_visual": 100,
        "num_dense": num_steps - num_sparse,
        "num_sparse": num_sparse,
        "tokens_processed": 1000.0 - 5 * num_sparse,
        "answer_tokens_processed": 1.0,
        "image_tokens_processed": 1.0,
        "train_cpu_seconds": 300.0 - num_sparse,
        "kept_precision": None if arm == "dense" else 0.25,
        "kept_recall": None if arm == "dense" else 0.5,
    }
    return key, Result(**(values | other))


WHOLE = [
    *(run("dense", seed, 0.40 + 0.01 * seed) for seed in range(3)),
    *(run("mine", seed, 0.42 + 0.012 * seed) for seed in range(3)),
    *(run("random", seed, 0.34) for seed in range(2)),
]


def plan(*arms: str, **other: Any) -> Round:
    return Round(about="", part="dev", tasks=("t",), arms=arms, seeds=(0, 1, 2), **other)


def cells(table: str, arm: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {arm} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_an_arm_is_compared_with_dense_and_random_seed_by_seed():
    table = arm_table(WHOLE, plan("dense", "mine", "random"), COSTS)
    # Differences .020, .022, .024: error .002 / sqrt(3), times 4.3027.
    assert cells(table, "mine") == [
        "mine",
        "3",
        "0.432 (0.007)",
        "+0.022 [+0.017, +0.027]",
        "+0.086 [+0.010, +0.162]",
        "0.900 (0.000)",
        "+0.000 [+0.000, +0.000]",
        "0.60",
        # 20 dense steps of 2 s, 80 sparse ones of 1 s, 10 s for the teacher; dense 100 x 2 s.
        "0.65",
        "0.73",
        "0.25",
        "0.50",
    ]
    assert cells(table, "dense")[3] == "-"
    assert cells(table, "random")[4] == "-"
    assert cells(table, "random")[8] == "0.60"


def test_a_round_may_compare_its_arms_with_others():
    names = {"dense": "twice", "random": "by_lot", "mine": "mine"}
    renamed = [(replace(key, arm=names[key.arm]), one) for key, one in WHOLE]
    own = plan("twice", "mine", "by_lot", dense="twice", random="by_lot")
    table, usual = arm_table(renamed, own, None), arm_table(WHOLE, plan(*names), None)
    assert cells(table, "mine") == cells(usual, "mine")
    assert cells(table, "twice")[3] == cells(table, "by_lot")[4] == "-"


def test_without_costs_the_table_has_none():
    assert cells(arm_table(WHOLE, plan("mine"), None), "mine")[8] == "-"


def test_the_time_to_dense_quality_is_where_the_line_crosses():
    found = [
        *(run("dense", seed, 0.30 + 0.01 * seed, fraction=0.7) for seed in range(3)),
        *(run("dense", seed, 0.40 + 0.01 * seed) for seed in range(3)),
        # Costs 10 + .65 / 1.3 of the steps' 120: 70 and 130; .41 lies half-way.
        *(run("mine", seed, 0.39, fraction=0.5) for seed in range(3)),
        *(run("mine", seed, 0.43) for seed in range(3)),
    ]
    (lines,) = time_lines(found, "dense", COSTS)
    judged, dense, mine = lines.splitlines()
    assert judged == (
        "- dense at 0.7 of the steps lies -0.100 [-0.100, -0.100] from dense at 1: valid"
    )
    assert dense.startswith(
        "- time to dense quality, dense: 1.00 (seeds 3; image words 0.310 at 0.7"
    )
    assert mine.startswith("- time to dense quality, mine: 0.50 (seeds 3; image words 0.390 at 0.5")
    # The shortest run has reached it already, and a seed that lacks a length does not count.
    early = [*found, *(run("mine", seed, 0.42, fraction=0.25) for seed in range(2))]
    assert "mine: at most 0.20 (seeds 2; " in time_lines(early, "dense", COSTS)[0]
    never = [(key, one) for key, one in found if key.arm == "dense"]
    never += [run("mine", 0, 0.2), run("mine", 0, 0.1, fraction=0.5)]
    assert "mine: not reached" in time_lines(never, "dense", COSTS)[0]


def test_a_dense_run_that_has_stopped_learning_judges_nothing():
    found = [
        *(run("dense", seed, 0.405 + 0.01 * (-1) ** seed, fraction=0.7) for seed in range(3)),
        *(run("dense", seed, 0.41) for seed in range(3)),
    ]
    assert "NOT valid" in time_lines(found, "dense", COSTS)[0]


def test_the_picture_has_a_point_for_each_length(tmp_path: Path):
    found = [*WHOLE, run("mine", 0, 0.39, fraction=0.5)]
    points = points_of(found, "dense", COSTS)
    assert [cost for cost, _, _ in points["mine"]] == [70 / 200, 130 / 200]
    assert points["dense"][0][0] == 1.0
    plot_task(points, "dense", tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 5000


def bench_of(folder: Path, name: str, arm: Arm) -> Bench:
    (folder / "run.yaml").write_text("{}")
    task = LearningTask(
        about="x",
        builder="digits",
        config=folder / "run.yaml",
        steps=100,
        num_train=1,
        num_dev=1,
        num_test=1,
        test_seed=9,
    )
    plan = Round(about="x", part="dev", tasks=("t",), arms=("mine",), seeds=(0,))
    return Bench(
        name=name, plan=plan, tasks={"t": task}, arms={"mine": arm}, work=folder, results=folder
    )


def write_costs(bench: Bench) -> None:
    path = bench.cost_path("t", 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    digests = {"mine": bench.digest(bench.cost_key("t", "mine", 0))}
    steps = {"mine": {"dense": 2.0, "sparse": 1.0}}
    path.write_text(json.dumps({"digests": digests, "steps": steps, "once": {"mine": 0.0}}))


def test_a_round_does_not_replace_the_costs_of_another(tmp_path: Path):
    small, large = (bench_of(tmp_path, name, Arm(about="x")) for name in ("small", "large"))
    write_costs(small)
    assert read_costs(small, "t") is not None
    assert read_costs(large, "t") is None


def test_costs_of_an_arm_that_was_changed_are_refused(tmp_path: Path):
    write_costs(bench_of(tmp_path, "small", Arm(about="x")))
    changed = Arm(about="x", settings={"elision": {"keep_share": 0.25}})
    with pytest.raises(ValueError, match="mine was timed with other settings"):
        read_costs(bench_of(tmp_path, "small", changed), "t")


def test_runs_of_a_seed_that_started_from_two_students_are_not_compared():
    require_one_student(WHOLE)
    other = run("mine", 0, 0.5, student="another")
    with pytest.raises(ValueError, match="^t: dense-seed0-steps100 started from student one, mine"):
        require_one_student([*WHOLE, other])
