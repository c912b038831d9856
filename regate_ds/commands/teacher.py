"""`regate teacher CONFIG`: compute the reference losses."""

from __future__ import annotations

import argparse

from regate_ds.commands.config_argument import add_config, read_config


def add_teacher(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    text = "compute the reference losses of the training set, once; finished shards are kept"
    teacher = commands.add_parser("teacher", parents=[debug], help=text, description=text)
    add_config(teacher)
    teacher.set_defaults(run=_run)


def _run(args: argparse.Namespace, _: list[str]) -> int:
    config = read_config(args)

    from regate_ds.recipe import teacher_job

    teacher_job.run_teacher(config)
    return 0
