"""`regate data TASK OUT` builds the data of a task, `regate data check CONFIG` checks a run's."""

from __future__ import annotations

import argparse

from regate_ds.commands.config_argument import add_config, read_config
from regate_ds.recipe.tasks.table import TASKS


def add_data(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    data = commands.add_parser("data", help="build a data set, or check one")
    names = data.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, task in TASKS.items():
        parser = names.add_parser(name, parents=[debug], help=task.about, description=task.about)
        task.add_arguments(parser)
        parser.set_defaults(run=_run)
    _add_check(names, debug)


def _add_check(names: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    about = "index the data of a run, once, and list its bad records"
    parser = names.add_parser("check", parents=[debug], help=about, description=about)
    add_config(parser)
    parser.add_argument(
        "--content",
        action="store_true",
        help="read everything again, and compare the hashes with those of the index",
    )
    parser.set_defaults(run=_check)


def _run(args: argparse.Namespace, _: list[str]) -> int:
    TASKS[args.task].build_data(args)
    return 0


def _check(args: argparse.Namespace, _: list[str]) -> int:
    from regate_ds.recipe.reports.data import check_data

    return 0 if check_data(read_config(args), content=args.content) else 1
