"""The arguments of commands that read a configuration, and the configuration they name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regate_ds.recipe.config.tree import RunConfig


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, as in configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as run.steps=100, in YAML"
    )


def read_config(args: argparse.Namespace) -> RunConfig:
    """Read the configuration of ``add_config``; ValueError is one line with file, key and value."""
    from regate_ds.recipe.config.tree import load_config

    return load_config(args.config, args.overrides)
