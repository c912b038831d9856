"""`regate compare RUN RUN ...`: put runs side by side."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_compare(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    text = "put runs side by side: quality, tokens, time, memory"
    compare = commands.add_parser("compare", parents=[debug], help=text, description=text)
    compare.add_argument("run_folders", type=Path, nargs="+", metavar="RUN")
    compare.add_argument("--out", type=Path, help="folder for compare.json and the pictures")
    compare.set_defaults(run=_run)


def _run(args: argparse.Namespace, _: list[str]) -> int:
    from regate_ds.recipe.reports import compare

    print(compare.compare_runs(args.run_folders, out=args.out))
    return 0
