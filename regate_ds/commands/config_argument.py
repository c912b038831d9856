"""The arguments that name a configuration."""

from __future__ import annotations

import argparse
from pathlib import Path


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, as in configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as run.steps=100, in YAML"
    )
