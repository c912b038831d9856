"""`regate data`"""

from __future__ import annotations

import argparse
from pathlib import Path


def _add_data(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    data = commands.add_parser("data", help="build a data set")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="KIND")
    text = "small visual question set from real images of digits, in LLaVA's JSON format"
    digits = kinds.add_parser("digits", parents=[debug], help=text, description=text)
    digits.add_argument("out", type=Path, help="folder that gets train.json, test.json and images/")
    digits.add_argument("--train", type=int, default=2000, metavar="N", help="training samples")
    digits.add_argument("--test", type=int, default=400, metavar="M", help="held-out samples")
    digits.add_argument("--seed", type=int, default=0, metavar="S")
    digits.add_argument("--frames", type=int, metavar="F", help="make clips of F frames each")
    digits.set_defaults(run=_data_digits)


def _data_digits(args: argparse.Namespace, _: list[str]) -> int:
    from regate_ds.recipe.tasks.digits.scenes import build_digits

    build_digits(
        args.out, num_train=args.train, num_test=args.test, seed=args.seed, num_frames=args.frames
    )
    return 0
