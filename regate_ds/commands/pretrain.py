"""`regate pretrain CONFIG`: a model from nothing, by an objective, with a helper or none."""

from __future__ import annotations

import argparse

from regate_ds.commands.config_argument import add_config
from regate_ds.commands.output import print_figures


def add_pretrain(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    text = "train a model from nothing on text or captions, by an objective with a helper or not"
    parser = commands.add_parser("pretrain", parents=[debug], help=text, description=text)
    add_config(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace, _: list[str]) -> int:
    from regate_ds.recipe.pretrain.config import load_pretrain

    config = load_pretrain(args.config, args.overrides)

    from regate_ds.recipe.pretrain import trainer

    print_figures(trainer.pretrain(config))
    return 0
