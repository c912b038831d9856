"""`regate bench` measures speed and memory, `regate bench learning` quality and cost."""

from __future__ import annotations

import argparse


def add_bench(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    bench = commands.add_parser(
        "bench", parents=[debug], add_help=False, help="measure speed and memory against baselines"
    )
    bench.set_defaults(run=_run)


def _run(_: argparse.Namespace, rest: list[str]) -> int:
    if rest[:1] == ["learning"]:
        from regate_ds.recipe.learning import command

        return command.main(rest[1:])
    from regate_ds.recipe.bench import step

    step.main(rest)
    return 0
