"""`regate rank CONFIG`: compute the orders of image tokens."""

from __future__ import annotations

import argparse

from regate_ds.commands.config_argument import add_config, read_config


def add_rank(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    text = "compute the orders of the training set's image tokens, once; finished shards are kept"
    rank = commands.add_parser("rank", parents=[debug], help=text, description=text)
    add_config(rank)
    rank.set_defaults(run=_run)


def _run(args: argparse.Namespace, _: list[str]) -> int:
    config = read_config(args)

    from regate_ds.recipe import rank_job

    rank_job.run_rank(config)
    return 0
