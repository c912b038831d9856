"""The files of a run: one JSON object per optimizer step, one per evaluation, and a summary.

config.yaml      the configuration, with defaults and overrides filled in
metrics.jsonl    step, loss, dense, tokens_total, tokens_kept, answer_total, answer_kept,
                 answer_entered, image_total, image_kept, filled, padded, step_seconds,
                 cpu_seconds, lr, grad_norm; with an online teacher also teacher_seconds, the
                 time to score this step's samples, which happens one step before
evals.jsonl      step, accuracies, and the totals of all steps so far
summary.json     the final figures
checkpoints/     see saving/checkpoint.py; model/ is the trained student
adapter/         with LoRA: the adapters alone, as peft loads them; in model/ they are merged
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from regate_ds.settings.yaml import read_yaml
from regate_ds.stores.atomic_file import make_folder, write_atomically

Row = dict[str, Any]


class RunFolder:
    """The files of one run; only one process writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.model, self.adapter = path / "model", path / "adapter"
        self._metrics, self._evals = path / "metrics.jsonl", path / "evals.jsonl"
        self._summary = path / "summary.json"

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def begin(self, config: str, *, may_hold_unsaved: bool = False) -> None:
        """Start a new run; ValueError if the folder already holds one.

        may_hold_unsaved: overwrite the files of a run that ended before its first checkpoint.
        """
        if not may_hold_unsaved:
            self.require_new()
        make_folder(self.path)
        write_atomically(self.config, config.encode())
        for path in (self._metrics, self._evals):
            write_atomically(path, b"")

    def resumes(self, resume: bool | str) -> bool:
        """Return whether to resume; `run.resume` "auto" resumes if there is a checkpoint."""
        return (self.checkpoints / "latest").is_file() if resume == "auto" else bool(resume)

    def require_new(self) -> None:
        """Refuse, by ValueError, a folder whose results would be overwritten."""
        if (self.checkpoints / "latest").is_file():
            raise ValueError(
                f"run.out={self.path} holds a run with checkpoints already; set run.resume=true to "
                "go on with it, or choose another folder"
            )
        results = [self._summary, self.model, self.adapter, self._metrics]
        found = [p.name for p in results if p.exists() and (p.is_dir() or p.stat().st_size)]
        if found:
            raise ValueError(
                f"run.out={self.path} holds a run already ({', '.join(found)}); choose another "
                "folder, or delete this one"
            )

    def require_unfinished(self) -> None:
        """Refuse, by ValueError, a folder that has results but no checkpoint to resume from."""
        found = [path.name for path in (self._summary, self.model) if path.exists()]
        if found:
            raise ValueError(
                f"run.out={self.path} has {', '.join(found)}, but no checkpoint to resume from; "
                "choose another folder, or delete this one"
            )

    def append_metrics(self, row: Row) -> None:
        _append(self._metrics, row)

    def append_eval(self, row: Row) -> None:
        """Append an evaluation; it replaces an earlier one after the same step."""
        others = self.evals()
        kept = [other for other in others if other["step"] != row["step"]]
        if len(kept) < len(others):
            _rewrite(self._evals, kept)
        _append(self._evals, row)

    def metrics(self) -> list[Row]:
        return _read_lines(self._metrics)

    def evals(self) -> list[Row]:
        return _read_lines(self._evals)

    def figures_before(self, done: int) -> str:
        """Return a hash of the figures of the first ``done`` steps."""
        rows = [row for row in (*self.metrics(), *self.evals()) if row["step"] < done]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()

    def forget_after(self, done: int) -> None:
        """Delete the rows beyond the checkpoint of ``done`` steps, so that no step stands twice.

        The evaluation after it is one of them: nothing says that it is as it was written.
        """
        _rewrite(self._metrics, [row for row in self.metrics() if row["step"] < done])
        _rewrite(self._evals, [row for row in self.evals() if row["step"] < done])

    def require_run(self) -> None:
        """Refuse, by ValueError, a folder that holds no run."""
        if not self.config.is_file():
            raise ValueError(
                f"{self.path} has no config.yaml, so it is not the folder of a run; give the "
                "run.out of a run that was started"
            )

    def settings(self) -> Row:
        """Return the configuration's dotted keys and values, {} if there is no config.yaml."""
        if not self.config.is_file():
            return {}
        return dict(leaves(read_yaml(self.config.read_text(encoding="utf-8")) or {}))

    def write_summary(self, summary: Row) -> None:
        write_atomically(self._summary, (json.dumps(summary, indent=2) + "\n").encode())

    @property
    def is_finished(self) -> bool:
        return self._summary.is_file()

    def summary(self) -> Row:
        """Return the final figures; ValueError if the run is not finished."""
        if not self.is_finished:
            raise ValueError(
                f"{self.path} has no summary.json, so it holds no finished run; give the folder of "
                "one, or finish this one with run.resume=true"
            )
        try:
            return _row(self._summary.read_bytes())
        except ValueError as error:
            raise ValueError(
                f"{self._summary} is not JSON ({error}); write it again with run.resume=true"
            ) from None


def leaves(tree: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and their values; an empty mapping counts as a value."""
    for key, value in tree.items():
        name = f"{where}{key}"
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{name}.")
        else:
            yield name, value


def totals(rows: Sequence[Row], gated_share: float) -> Row:
    """Return sums and medians over steps.

    ``tokens_processed`` is the mean over layers of the number of positions that ran, padding
    excluded: the kept ones in gated layers, all of them in the others. Where a part of a layer is
    gated, the layer counts by that part's share of its linear FLOPs.

    gated_share: of the decoder's linear FLOPs, as a mean over layers.
    """
    dense = [row["step_seconds"] for row in rows if row["dense"]]
    sparse = [row["step_seconds"] for row in rows if not row["dense"]]
    scored = [row["teacher_seconds"] for row in rows if "teacher_seconds" in row]
    return {
        "tokens_processed": _processed(rows, "tokens", gated_share),
        "answer_tokens_processed": _processed(rows, "answer", gated_share),
        "image_tokens_processed": _processed(rows, "image", gated_share),
        "train_seconds": sum(row["step_seconds"] for row in rows),
        "train_cpu_seconds": sum(row["cpu_seconds"] for row in rows),
        "step_seconds_dense": statistics.median(dense) if dense else None,
        "step_seconds_sparse": statistics.median(sparse) if sparse else None,
        **_rates(rows),
        **({"teacher_seconds": sum(scored)} if scored else {}),
    }


def _rates(rows: Sequence[Row]) -> Row:
    """Return tokens and FLOPs a second, of what ran; FLOPs only if every row has them."""
    seconds = sum(row["step_seconds"] for row in rows)
    if not seconds:
        return {}
    found = {"tokens_per_second": sum(row["tokens_total"] for row in rows) / seconds}
    if all("flops" in row for row in rows):
        flops = sum(row["flops"] for row in rows)
        found |= {"flops": flops, "flops_per_second": flops / seconds}
    return found


def _processed(rows: Sequence[Row], kind: str, gated_share: float) -> float:
    # Steps that an older version wrote do not count image tokens, nor answers apart from targets.
    total = sum(row.get(f"{kind}_total", 0) for row in rows)
    kept = sum(row.get(f"{kind}_entered", row.get(f"{kind}_kept", 0)) for row in rows)
    return (1.0 - gated_share) * total + gated_share * kept


def _append(path: Path, row: Row) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _rewrite(path: Path, rows: list[Row]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _read_lines(path: Path) -> list[Row]:
    """Read complete lines only: a killed run may have left half a line at the end.

    ValueError names a line that is damaged.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return [
        _figures(line, path, number) for number, line in enumerate(lines, 1) if line[-1:] == b"\n"
    ]


def _figures(line: bytes, path: Path, number: int) -> Row:
    try:
        row = _row(line)
        if "step" not in row:
            raise ValueError("it has no step")
    except ValueError as error:
        raise ValueError(f"{path}, line {number}, is damaged ({error}); delete that line") from None
    return row


def _row(content: bytes) -> Row:
    row = json.loads(content)
    if not isinstance(row, dict):
        raise ValueError("it is no row of figures")
    return row
