"""The line on cost: a ratio of two runs, and the sum over one run's own steps."""

from __future__ import annotations

from pathlib import Path

from regate_ds.recipe.reports.cost import cost_line
from regate_ds.recipe.run_folder import RunFolder


def run(path: Path, seconds: float, steps: list[tuple[bool, float]]) -> RunFolder:
    folder = RunFolder(path)
    folder.begin("{}")
    for number, (dense, cpu) in enumerate(steps):
        folder.append_metrics({"step": number, "dense": dense, "cpu_seconds": cpu})
    folder.write_summary({"train_cpu_seconds": seconds})
    return folder


def test_the_line_has_the_ratio_and_the_sum_of_the_runs_own_steps(tmp_path):
    dense = run(tmp_path / "dense", 40.0, [(True, 10.0)] * 4)
    elided = run(tmp_path / "regate", 26.0, [(True, 10.0), (False, 5.0), (False, 6.0), (False, 5)])
    assert cost_line(dense, elided) == (
        "regate took 0.65 of dense's train CPU seconds; by its own steps 0.25 + 0.75 x 0.50 = "
        "0.62: 0.25 of them were dense, and a sparse one took 0.50 of a dense one"
    )


def test_a_run_without_sparse_steps_has_the_ratio_alone(tmp_path):
    dense = run(tmp_path / "dense", 40.0, [(True, 10.0)] * 4)
    other = run(tmp_path / "other", 44.0, [(True, 11.0)] * 4)
    assert cost_line(dense, other) == "other took 1.10 of dense's train CPU seconds"
