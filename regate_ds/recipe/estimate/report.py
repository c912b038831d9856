"""`regate estimate`: the forecast of a run as lines, beside others with changed settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.corpus import load_corpus
from regate_ds.recipe.estimate.forecast import Machine, forecast
from regate_ds.recipe.estimate.seen import means, require_same, rows_by_kind

KNOBS = (
    ("elision.images.keep_share=0.25",),
    ("elision.keep_share=0.25",),
    ("elision.first_layer=0",),
    ("elision.schedule.final_dense_share=0.0",),
    ("run.balance=true",),
)
"""Settings that may make a run shorter; the report names those that do."""


def report_of(
    path: Path,
    overrides: Sequence[str],
    machine: Machine,
    what_if: Sequence[str],
    seen: Path | None = None,
) -> dict[str, Any]:
    """Return the forecast of a configuration, of the changed one if asked, and what knobs bring.

    seen: the folder of a run of this configuration on as many ranks; what its steps took stands
        beside what is told of the same steps.
    """
    config = load_config(path, overrides)
    corpus = load_corpus(config, weights=False)
    base = forecast(config, corpus, machine)
    found: dict[str, Any] = {"run": asdict(base), "knobs": {}}
    if seen is not None:
        require_same(seen, config, machine.num)
        rows = rows_by_kind(seen)
        steps = {kind: [row["step"] for row in of] for kind, of in rows.items()}
        told = forecast(config, corpus, machine, with_memory=False, steps=steps)
        found["seen"] = {"told": {"seconds": told.seconds, "flops": told.flops}, **means(rows)}
    if what_if:
        changed = load_config(path, [*overrides, *what_if])
        has_same_samples = (changed.model, changed.data) == (config.model, config.data)
        own = corpus if has_same_samples else load_corpus(changed, weights=False)
        again = forecast(changed, own, machine)
        found["what_if"] = {"settings": list(what_if), **asdict(again)}
    for knob in KNOBS:
        try:
            changed = load_config(path, [*overrides, *knob])
        except ValueError:
            continue  # A setting that this run cannot have is no advice.
        again = forecast(changed, corpus, machine, with_memory=False)
        share = again.run_seconds / base.run_seconds
        if share < 0.99:
            found["knobs"][" ".join(knob)] = share
    return found


def as_lines(report: dict[str, Any], machine: Machine, name: str) -> str:
    """Return the report as text."""
    lines = [
        f"{machine.num} x {name} at {machine.efficiency:.0%} of its peak: an assumption, which "
        "cancels in ratios; nothing was run"
    ]
    lines += _run_lines(report["run"], machine)
    if "seen" in report:
        seen = report["seen"]
        told = seen["told"]
        lines.append(
            f"  seen: a sparse step took {_ratio(seen['step_seconds'])} of a dense one's seconds, "
            f"{_ratio(seen['cpu_seconds'])} of its CPU seconds (told: {_ratio(told['seconds'])}) "
            f"and {_ratio(seen['flops'])} of its FLOPs (told: {_ratio(told['flops'])})"
        )
    if "what_if" in report:
        settings = " ".join(report["what_if"]["settings"])
        share = report["what_if"]["run_seconds"] / report["run"]["run_seconds"]
        lines += [f"what if {settings}: {share:.2f} of that run"]
        lines += _run_lines(report["what_if"], machine)
    for knob, share in sorted(report["knobs"].items(), key=lambda pair: pair[1]):
        lines.append(f"{knob} would take {share:.2f} of the run")
    return "\n".join(lines)


def _ratio(of: dict[str, float]) -> str:
    return f"{of['sparse'] / of['dense']:.3f}"


def _run_lines(run: dict[str, Any], machine: Machine) -> list[str]:
    seconds, steps, memory = run["seconds"], run["steps"], run["memory"]
    hours = machine.num / 3600
    ratio = run["run_seconds"] / run["dense_run_seconds"]
    lines = [
        f"  step: dense {seconds['dense']:.3g} s, sparse {seconds['sparse']:.3g} s, "
        f"{seconds['sparse'] / seconds['dense']:.2f} of it",
        f"  run: {steps['dense']} dense and {steps['sparse']} sparse steps, "
        f"{run['run_seconds'] * hours:.3g} GPU-hours, {run['before_seconds'] * hours:.2g} of them "
        f"teacher and ranking; all dense {run['dense_run_seconds'] * hours:.3g}: {ratio:.2f} of it",
        "  memory of a rank: "
        + ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in memory.items()),
    ]
    over = [kind for kind, size in memory.items() if size > machine.gpu.memory]
    if over:
        lines.append(
            f"  more than the {machine.gpu.memory / 1e9:.0f} GB there are: {', '.join(over)}"
        )
    total = sum(run["limits"].values())
    shares = sorted(run["limits"].items(), key=lambda pair: -pair[1])
    named = [f"{name} {value / total:.0%}" for name, value in shares if value > 0.01 * total]
    return [*lines, f"  a sparse step goes to: {', '.join(named)}"]
