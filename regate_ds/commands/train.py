"""`regate train`"""

from __future__ import annotations

import argparse
from typing import Any

from regate_ds.commands.config_argument import _add_config
from regate_ds.commands.output import _print_on_first
from regate_ds.job.ranks import announce
from regate_ds.job.supervise import join_job
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.corpus import _task
from regate_ds.recipe.estimate.plan_walk import walk_plan
from regate_ds.recipe.preflight import judge_run
from regate_ds.recipe.trainer import Trainer


def _add_train(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    text = (
        "train; elision.enabled=false is the host's own run, elision.keep_share=1.0 the dense one"
    )
    train = commands.add_parser("train", parents=[debug], help=text, description=text)
    _add_config(train)
    train.set_defaults(run=_train)


def _train(args: argparse.Namespace, _: list[str]) -> int:
    from regate_ds.recipe.config.tree import load_config

    config = load_config(args.config, args.overrides)

    from regate_ds.commands.train import train

    train(config)
    return 0


def train(config: RunConfig) -> dict[str, Any]:
    """Train one run and return its summary (empty on ranks other than the first)."""
    announce()
    judge_run(config)
    if config.run.plan_only:
        return _print_on_first(walk_plan(config, _task(config, weights=False)))
    with join_job("train") as process:
        summary = Trainer(config, _task(config), process).run()
        return _print_on_first(summary)
