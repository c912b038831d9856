"""`regate train CONFIG`: train one run."""

from __future__ import annotations

import argparse

from regate_ds.commands.config_argument import add_config, read_config
from regate_ds.commands.output import print_figures


def add_train(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    text = (
        "train; elision.enabled=false is the host's own run, elision.execution=none the dense one"
    )
    train = commands.add_parser("train", parents=[debug], help=text, description=text)
    add_config(train)
    train.set_defaults(run=_run)


def _run(args: argparse.Namespace, _: list[str]) -> int:
    config = read_config(args)

    from regate_ds.recipe import trainer

    print_figures(trainer.train(config))
    return 0
