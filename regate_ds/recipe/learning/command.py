"""`regate bench learning ROUND`: run what a round lacks, and print its tables."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import torch

from regate_ds.recipe.learning.plot import plot_task, points_of
from regate_ds.recipe.learning.run_round import Bench, measure_costs, run_missing
from regate_ds.recipe.learning.table import read_costs, round_tables
from regate_ds.stores.atomic_file import make_folder, write_atomically


def main(arguments: Sequence[str]) -> int:
    """Return 0 if every run of the round has a result, else 1."""
    parser = ArgumentParser(prog="regate bench learning", description=__doc__)
    parser.add_argument("round", help="name of a file in FILES/rounds: quick, screen, final ...")
    parser.add_argument(
        "--files", type=Path, default=Path("configs/learning"), help="arms, tasks and rounds"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("docs/learning"), help="where results are kept"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/learning"), help="data, students and runs"
    )
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at once")
    parser.add_argument("--tables", action="store_true", help="print the tables and run nothing")
    parser.add_argument(
        "--costs",
        action="store_true",
        help="time the steps of all arms, in turns, for each task and the first seed",
    )
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be at least 1")
    if torch.cuda.is_available() and not args.tables:
        raise ValueError(
            "the benchmark counts CPU seconds, which mean nothing where a GPU works; hide it: "
            "CUDA_VISIBLE_DEVICES= regate bench learning ..."
        )
    bench = Bench.read(args.files, args.round, work=args.work, results=args.results)
    if not args.costs:
        # What the tables will read is judged before hours of runs.
        for task in bench.plan.tasks:
            read_costs(bench, task)
    failed = [] if args.tables else run_missing(bench, jobs=args.jobs, say=_say)
    if args.costs:
        for task in bench.plan.tasks:
            measure_costs(bench, task, bench.plan.seeds[0], _say)
    for line in failed:
        print(line, file=sys.stderr)
    tables = round_tables(bench)
    make_folder(args.results)
    _draw(bench, args.results, args.round)
    write_atomically(args.results / f"{args.round}.md", tables.encode())
    print(f"{tables}\n{args.results / args.round}.md")
    return 1 if bench.missing() else 0


def _draw(bench: Bench, results: Path, name: str) -> None:
    """Draw each task of the round whose steps were timed."""
    found = bench.finished()
    for task in bench.plan.tasks:
        costs = read_costs(bench, task)
        own = [(key, result) for key, result in found if key.task == task]
        if costs is not None and own:
            dense = bench.plan.dense
            plot_task(points_of(own, dense, costs), dense, results / f"{name}-{task}.png")


def _say(line: str) -> None:
    print(line, flush=True)
