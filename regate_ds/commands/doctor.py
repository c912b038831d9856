"""`regate doctor [CONFIG] [--model DIR]`: check what this node and a checkpoint have."""

from __future__ import annotations

import argparse
from pathlib import Path

from regate_ds.commands.config_argument import read_config
from regate_ds.job.ranks import is_first_rank


def add_doctor(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    text = "show versions, devices and what is missing; fail only if something required is missing"
    doctor = commands.add_parser("doctor", parents=[debug], help=text, description=text)
    doctor.add_argument(
        "config", type=Path, nargs="?", metavar="CONFIG", help="also check memory, disk and groups"
    )
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    doctor.add_argument(
        "--model", type=Path, metavar="DIR", help="a checkpoint: whether elision knows its model"
    )
    doctor.add_argument("--json", action="store_true", help="print the checks as JSON")
    doctor.set_defaults(run=_run)


def _run(args: argparse.Namespace, _: list[str]) -> int:
    config = None if args.config is None else read_config(args)

    from regate_ds.recipe.doctor import examine as doctor

    checks = doctor.examine(config)
    if args.model is not None:
        from regate_ds.recipe.doctor.model import examine_model

        checks += examine_model(args.model)
    if is_first_rank():
        print(doctor.as_json(checks) if args.json else doctor.as_text(checks))
    return 1 if doctor.lacks_required(checks) else 0
