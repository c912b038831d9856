"""`regate eval RUN`: measure the accuracy of a finished run on held-out questions."""

from __future__ import annotations

import argparse
from pathlib import Path

from regate_ds.commands.output import print_figures


def add_eval(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    text = "measure the accuracy of a finished run on held-out questions"
    evaluate = commands.add_parser("eval", parents=[debug], help=text, description=text)
    evaluate.add_argument("run_folder", type=Path, metavar="RUN", help="folder of the run")
    evaluate.set_defaults(run=_run)


def _run(args: argparse.Namespace, _: list[str]) -> int:
    from regate_ds.recipe.evaluation import finished_run

    print_figures(finished_run.evaluate_run(args.run_folder))
    return 0
