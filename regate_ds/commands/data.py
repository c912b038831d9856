"""`regate data TASK OUT`: build the data of a task."""

from __future__ import annotations

import argparse

from regate_ds.recipe.tasks.table import TASKS


def add_data(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    data = commands.add_parser("data", help="build a data set")
    names = data.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, task in TASKS.items():
        parser = names.add_parser(name, parents=[debug], help=task.about, description=task.about)
        task.add_arguments(parser)
        parser.set_defaults(run=_run)


def _run(args: argparse.Namespace, _: list[str]) -> int:
    TASKS[args.task].build_data(args)
    return 0
