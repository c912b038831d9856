"""`regate estimate CONFIG`: time, memory and cost of a run before it starts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from regate_ds.commands.config_argument import add_config


def add_estimate(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    text = "say what a run will take, dense and elided, what limits it, and which setting helps"
    parser = commands.add_parser("estimate", parents=[debug], help=text, description=text)
    add_config(parser)
    parser.add_argument(
        "--gpu", default="h100", metavar="NAME", help="a100, h100, h200, b200, l40s"
    )
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="how many (8)")
    parser.add_argument(
        "--efficiency", type=float, default=0.4, metavar="S", help="share of the GPU's peak (0.4)"
    )
    parser.add_argument(
        "--what-if", nargs="+", default=[], metavar="key=value", help="the same with these settings"
    )
    parser.add_argument(
        "--seen", type=Path, metavar="RUN", help="what the steps of this run's folder took, beside"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace, _: list[str]) -> int:
    from regate_ds.recipe.estimate.forecast import Machine
    from regate_ds.recipe.estimate.gpus import GPUS
    from regate_ds.recipe.estimate.report import as_lines, report_of

    if args.gpu not in GPUS:
        raise ValueError(f"--gpu {args.gpu}: is not known; give one of {', '.join(GPUS)}")
    if args.gpus < 1 or not 0.0 < args.efficiency <= 1.0:
        raise ValueError(
            f"--gpus {args.gpus} --efficiency {args.efficiency}: give at least 1, and a share "
            "above 0 and at most 1"
        )
    machine = Machine(GPUS[args.gpu], args.gpus, args.efficiency)
    report = report_of(args.config, args.overrides, machine, args.what_if, args.seen)
    print(json.dumps(report, indent=1) if args.json else as_lines(report, machine, args.gpu))
    return 0
