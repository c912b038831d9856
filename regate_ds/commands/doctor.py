"""`regate doctor`"""

from __future__ import annotations

import argparse
from pathlib import Path


def _add_doctor(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    text = "show versions, devices and what is missing; fails only if something required is"
    doctor = commands.add_parser("doctor", parents=[debug], help=text, description=text)
    doctor.add_argument(
        "config", type=Path, nargs="?", metavar="CONFIG", help="also judge memory, disk and groups"
    )
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="as of train")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace, _: list[str]) -> int:
    from regate_ds.recipe.config.tree import load_config

    config = None if args.config is None else load_config(args.config, args.overrides)

    from regate_ds.job.ranks import discover
    from regate_ds.recipe.doctor import examine as doctor

    findings = doctor.examine(config)
    if discover().rank == 0:
        print(doctor.as_json(findings) if args.json else doctor.as_text(findings))
    return 1 if doctor.lacks_required(findings) else 0
