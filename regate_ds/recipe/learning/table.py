"""The tables of a round: each arm's accuracy, its differences, its cost, and time to dense quality.

    cost of a run = its dense steps * c_dense + its sparse steps * c_sparse + what is computed once

with the CPU seconds of a step as they were measured with all arms taking turns. What is computed
once is the teacher's job and the ranking of image tokens, where the arm reads them.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regate_ds.recipe.learning.files import Round, RunKey
from regate_ds.recipe.learning.result import Result, require_one_student
from regate_ds.recipe.learning.run_round import Bench
from regate_ds.recipe.learning.statistics import (
    Interval,
    cost_to_reach,
    paired,
    standard_error,
)

VALID_AT = 0.7
"""Time to dense quality means something if dense with this share of the steps is worse."""

_Found = Sequence[tuple[RunKey, Result]]


@dataclass(frozen=True)
class Costs:
    """The CPU seconds of steps and of what is computed once, for one task."""

    steps: Mapping[str, Mapping[str, Any]]
    once: Mapping[str, float]
    """By arm: the seconds of its teacher and ranking together."""

    def of(self, result: Result) -> float | None:
        """Return the CPU seconds of a run by its steps; None where the arm was not timed."""
        own = self.steps.get(result.arm)
        if own is None:
            return None
        kinds = ((result.num_dense, own["dense"]), (result.num_sparse, own["sparse"]))
        if any(number and seconds is None for number, seconds in kinds):
            return None
        steps = sum(number * seconds for number, seconds in kinds if number)
        return steps + self.once.get(result.arm, 0.0)


def read_costs(bench: Bench, task: str) -> Costs | None:
    """Return the costs of a task as means over the seeds that were timed; None without any.

    ValueError if an arm was timed with other settings.
    """
    read = [_read_cost(bench, task, seed) for seed in bench.plan.seeds]
    read = [one for one in read if one is not None]
    if not read:
        return None
    arms = {arm for one in read for arm in one["steps"]}
    steps = {
        arm: {kind: _mean([one["steps"].get(arm, {}).get(kind) for one in read]) for kind in _KINDS}
        for arm in arms
    }
    once = {arm: _mean([one["once"].get(arm) for one in read]) or 0.0 for arm in arms}
    return Costs(steps, once)


_KINDS = ("dense", "sparse")


def _read_cost(bench: Bench, task: str, seed: int) -> dict[str, Any] | None:
    path = bench.cost_path(task, seed)
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    for arm, digest in found["digests"].items():
        if arm in bench.arms and digest != bench.digest(bench.cost_key(task, arm, seed)):
            raise ValueError(
                f"{path}: the arm {arm} was timed with other settings; time the round again with "
                "--costs, or delete the file"
            )
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def round_tables(bench: Bench) -> str:
    """Return the tables of all tasks of a round, from the results that are there."""
    found = bench.finished()
    require_one_student(found)
    parts = []
    for task in bench.plan.tasks:
        own = [(key, result) for key, result in found if key.task == task]
        num = sum(key.task == task for key in bench.keys)
        parts.append(f"### {task}, {bench.plan.part}: {len(own)} of {num} runs")
        if own:
            costs = read_costs(bench, task)
            parts += [arm_table(own, bench.plan, costs), *time_lines(own, bench.plan.dense, costs)]
    return "\n\n".join(parts) + "\n"


def arm_table(found: _Found, plan: Round, costs: Costs | None) -> str:
    """Return a Markdown table of the runs of whole length, an arm a row."""
    whole = _by_arm(found)
    rows = [_HEADS, ["---"] * len(_HEADS)]
    rows += [_row(arm, whole, plan, costs) for arm in plan.arms if arm in whole]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


_HEADS = [
    "arm",
    "seeds",
    "image words",
    "to dense",
    "to random",
    "other words",
    "other to dense",
    "tokens",
    "cost",
    "raw CPU",
    "kept: precision",
    "recall",
]


def _row(
    arm: str, whole: Mapping[str, Mapping[int, Result]], plan: Round, costs: Costs | None
) -> list[str]:
    own, dense, random = (whole.get(one, {}) for one in (arm, plan.dense, plan.random))
    visual, plain = _values(own, "accuracy_visual"), _values(own, "accuracy_plain")
    results = list(own.values())
    return [
        arm,
        str(len(own)),
        _mean_and_error(list(visual.values())),
        _shown(None if arm == plan.dense else paired(visual, _values(dense, "accuracy_visual"))),
        _shown(None if arm == plan.random else paired(visual, _values(random, "accuracy_visual"))),
        _mean_and_error(list(plain.values())),
        _shown(None if arm == plan.dense else paired(plain, _values(dense, "accuracy_plain"))),
        _share(results, list(dense.values()), lambda one: one.tokens_processed),
        _share(results, list(dense.values()), lambda one: costs.of(one) if costs else None),
        _share(results, list(dense.values()), lambda one: one.train_cpu_seconds),
        _number(_mean([one.kept_precision for one in results])),
        _number(_mean([one.kept_recall for one in results])),
    ]


def time_lines(found: _Found, dense_arm: str, costs: Costs | None) -> list[str]:
    """Return a line for each arm that was trained at several lengths; none without costs."""
    by_length: dict[str, dict[float, dict[int, Result]]] = defaultdict(lambda: defaultdict(dict))
    for key, result in found:
        by_length[key.arm][key.fraction][key.seed] = result
    dense = by_length.get(dense_arm, {})
    if costs is None or 1.0 not in dense or len(dense) < 2:
        return []
    lines = [_validity(dense)]
    for arm, lengths in by_length.items():
        if len(lengths) > 1:
            lines.append(f"- time to dense quality, {arm}: {_time(lengths, dense[1.0], costs)}")
    return ["\n".join(lines)]


def _time(
    lengths: Mapping[float, Mapping[int, Result]], dense: Mapping[int, Result], costs: Costs
) -> str:
    """Return the figure, over the seeds that dense at 1 and all lengths of the arm have."""
    seeds = sorted(set(dense).intersection(*lengths.values()))
    if not seeds:
        return "no seed has all lengths"
    own = {share: {seed: runs[seed] for seed in seeds} for share, runs in lengths.items()}
    whole, wanted = _point({seed: dense[seed] for seed in seeds}, costs)
    points = sorted(_point(runs, costs) for runs in own.values())
    reached = cost_to_reach(points, wanted)
    text = "not reached" if reached is None else f"{reached / whole:.2f}"
    bound = "at most " if points[0][1] >= wanted else ""
    shown = ", ".join(_length(share, runs) for share, runs in sorted(own.items()))
    return f"{bound}{text} (seeds {len(seeds)}; image words {shown})"


def _validity(dense: Mapping[float, Mapping[int, Result]]) -> str:
    shorter = dense.get(VALID_AT)
    if shorter is None:
        return f"- no dense run at {VALID_AT} of the steps: the figures below are not judged"
    lost = paired(_values(shorter, "accuracy_visual"), _values(dense[1.0], "accuracy_visual"))
    verdict = "valid" if lost is not None and lost.is_below_zero else "NOT valid"
    return f"- dense at {VALID_AT} of the steps lies {_shown(lost)} from dense at 1: {verdict}"


def _point(own: Mapping[int, Result], costs: Costs) -> tuple[float, float]:
    """Return mean cost and accuracy. ValueError if the arm was not timed."""
    cost = _mean([costs.of(one) for one in own.values()])
    if cost is None:
        arm = next(iter(own.values())).arm
        raise ValueError(f"the arm {arm} was not timed; run the round with --costs")
    return cost, statistics.fmean(_values(own, "accuracy_visual").values())


def _length(share: float, own: Mapping[int, Result]) -> str:
    return f"{statistics.fmean(_values(own, 'accuracy_visual').values()):.3f} at {share:g}"


def _by_arm(found: _Found) -> dict[str, dict[int, Result]]:
    whole: dict[str, dict[int, Result]] = defaultdict(dict)
    for key, result in found:
        if key.fraction == 1.0:
            whole[key.arm][key.seed] = result
    return whole


def _values(own: Mapping[int, Result], name: str) -> dict[int, float]:
    return {seed: getattr(result, name) for seed, result in own.items()}


def _share(ours: Sequence[Result], dense: Sequence[Result], figure: Any) -> str:
    own, whole = _mean([figure(one) for one in ours]), _mean([figure(one) for one in dense])
    return "-" if own is None or not whole else f"{own / whole:.2f}"


def _mean_and_error(values: Sequence[float]) -> str:
    error = standard_error(values)
    return f"{statistics.fmean(values):.3f}" + ("" if error is None else f" ({error:.3f})")


def _shown(found: Interval | None) -> str:
    if found is None:
        return "-"
    if found.low is None or found.high is None:
        return f"{found.mean:+.3f}"
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
