"""`regate compare`: put runs side by side, as a table, compare.json and pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regate_ds.recipe.reports.plots import plot_accuracy, plot_tokens
from regate_ds.recipe.run_folder import RunFolder
from regate_ds.stores.atomic_file import write_atomically

TABLE_COLUMNS = (
    ("accuracy_visual", "image words", "{:.3f}"),
    ("accuracy_plain", "other words", "{:.3f}"),
    ("answer_tokens_processed", "answer tok.", "{:.0f}"),
    ("image_tokens_processed", "image tok.", "{:.0f}"),
    ("tokens_processed", "all tokens", "{:.0f}"),
    ("step_seconds_dense", "s/dense", "{:.3f}"),
    ("step_seconds_sparse", "s/sparse", "{:.3f}"),
    ("train_seconds", "train s", "{:.1f}"),
    ("train_cpu_seconds", "train CPU s", "{:.1f}"),
    ("peak_memory_bytes", "peak MB", "{:.0f}"),
)
"""Key of a run's summary, its heading, and the format of its value."""


_MAY_DIFFER = {"run.out", "run.resume"}
"""Settings that may differ between runs that train the same way."""


def compare_runs(folders: Sequence[Path], *, out: Path | None = None) -> str:
    """Return the table of finished runs; with ``out``, write compare.json and pictures there."""
    runs = [RunFolder(folder) for folder in folders]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(
            f"runs are named by their folders, and {names} holds a name twice; rename a folder"
        )
    summaries = {run.name: run.summary() for run in runs}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"runs": summaries}, indent=2) + "\n"
        write_atomically(out / "compare.json", content.encode())
        evals = {run.name: rows for run in runs if len(rows := run.evals()) > 1}
        if evals:
            plot_accuracy(evals, out)
        plot_tokens(summaries, out)
    return "\n".join([table(summaries), *differences(runs, summaries)])


def differences(runs: Sequence[RunFolder], summaries: dict[str, dict[str, Any]]) -> list[str]:
    """Return a line for each setting, except the method's own, in which the runs differ."""
    settings = {
        run.name: {**run.settings(), "world_size": summaries[run.name].get("world_size")}
        for run in runs
    }
    # The order is the configuration's, as the first run with the key has it.
    keys = dict.fromkeys(key for own in settings.values() for key in own)
    lines = []
    for key in keys:
        values = {name: own.get(key) for name, own in settings.items()}
        may_differ = key.startswith("elision.") or key in _MAY_DIFFER
        if may_differ or len(set(map(repr, values.values()))) == 1:
            continue
        lines.append(f"note: {key} differs: {', '.join(f'{n} {v}' for n, v in values.items())}")
    return lines


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """Return a table with one row for each run; a missing value is a dash."""
    cells = [["run", *(heading for _, heading, _ in TABLE_COLUMNS)]]
    for name, summary in summaries.items():
        cells.append([name, *(_cell(key, form, summary) for key, _, form in TABLE_COLUMNS)])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))
        )
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(key: str, form: str, summary: dict[str, Any]) -> str:
    value = summary.get(key)
    if value is None:
        return "-"
    return form.format(value / 1e6 if key == "peak_memory_bytes" else value)
