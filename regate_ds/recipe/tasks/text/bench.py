"""`regate bench text`: dense, merged and superposed training on plain text of one's own.

Every run goes into OUT as one JSON file, and one that is there is not run again. The table has the
mean over seeds and its standard error.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, get_args

import torch

from regate_ds.job.progress import progress
from regate_ds.recipe.tasks.text.arms import TEXT_ARMS
from regate_ds.recipe.tasks.text.blocks import open_text
from regate_ds.recipe.tasks.text.documents import By
from regate_ds.recipe.tasks.text.trial import TextBench, TrialSizes, run_trial
from regate_ds.stores.atomic_file import make_folder, write_atomically


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, and print the table."""
    args = _parser().parse_args(arguments)
    unknown = sorted(set(args.arms) - TEXT_ARMS.keys())
    if unknown:
        raise ValueError(f"--arms {unknown}: must be of {list(TEXT_ARMS)}")
    # Matrices this small gain nothing from more threads, and CPU seconds of one are steadier.
    torch.set_num_threads(1)
    own = {name: getattr(args, name) for name in ("steps", "rows", "hidden", "layers", "lr")}
    sizes = replace(TrialSizes(), **own)
    blocks = open_text(args.text, length=args.length, vocab_size=args.vocab, by=args.by)
    make_folder(args.out)
    bench = TextBench(blocks=blocks, sizes=sizes, folder=args.out)
    about = {**asdict(sizes), "length": args.length, "vocab": args.vocab, "text": str(args.text)}
    found: list[dict[str, Any]] = []
    with progress(len(args.arms) * len(args.seeds), desc="text", unit="run") as bar:
        for seed in args.seeds:
            for name in args.arms:
                path = args.out / f"{name.replace(', ', '-')}-{seed}.json"
                if not path.is_file():
                    trial = run_trial(bench, name, seed=seed)
                    row = {**trial.as_row(), "sizes": about}
                    write_atomically(path, (json.dumps(row, indent=1) + "\n").encode())
                found.append(_read(path, about))
                bar.update()
    print(table_of_trials(found))
    return 0


def table_of_trials(rows: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table with a line for each arm."""
    lines = [
        "| run | held-out loss | train CPU s | tokens read | loss before and at the switch |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == name]
        losses, seconds = ([row["points"][-1][n] for row in mine] for n in (2, 1))
        jumps = [row["jump"] for row in mine if "loss_merged" in row["jump"]]
        sides = [mean(j[side] for j in jumps) for side in ("loss_merged", "loss_single") if jumps]
        taught = mean(row["teacher_seconds"] for row in mine)
        cost = f"{mean(seconds):.0f}" + (f" + teacher {taught:.0f}" if taught else "")
        lines.append(
            f"| {name} | {_with_error(losses)} | {cost} | {mine[0]['tokens']:,} | "
            f"{', '.join(f'{x:.3f}' for x in sides)} |"
        )
    return "\n".join(lines)


def _with_error(values: Sequence[float]) -> str:
    error = f" ± {stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{error}"


def _read(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    row = json.loads(path.read_text(encoding="utf-8"))
    if row["sizes"] != about:
        raise ValueError(f"{path} is of other sizes: {row['sizes']}; give another --out")
    return row


def _parser() -> argparse.ArgumentParser:
    sizes = TrialSizes()
    parser = argparse.ArgumentParser(prog="regate bench text", description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="plain text: a file or a folder")
    parser.add_argument("--by", choices=get_args(By), default="line", help="what a document is")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--arms", nargs="+", default=list(TEXT_ARMS), help="which runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--vocab", type=int, default=1024, help="tokens of the tokenizer")
    parser.add_argument("--steps", type=int, default=sizes.steps, help="of the dense run")
    parser.add_argument("--rows", type=int, default=sizes.rows, help="rows of a step")
    parser.add_argument("--hidden", type=int, default=sizes.hidden, help="a multiple of 32")
    parser.add_argument("--layers", type=int, default=sizes.layers)
    parser.add_argument("--lr", type=float, default=sizes.lr)
    return parser
