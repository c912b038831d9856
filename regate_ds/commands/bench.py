"""`regate bench`: a step, the teacher's scoring, or whole trainings, against their baselines."""

from __future__ import annotations

import argparse

BENCHMARKS = {
    "step": "time, memory and transfers of a step, sparse and dense, on a host",
    "teacher": "the teacher's scoring against a forward pass with all logits",
    "learning": "quality and cost of whole trainings",
    "text": "dense, merged and superposed trainings on plain text of your own",
}


def add_bench(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    text = "measure a step, the teacher or whole trainings against baselines"
    bench = commands.add_parser("bench", parents=[debug], help=text, description=text)
    lines = [f"{name}: {about}" for name, about in BENCHMARKS.items()]
    bench.add_argument("benchmark", choices=BENCHMARKS, help="; ".join(lines))
    bench.add_argument("rest", nargs=argparse.REMAINDER, help="see regate bench BENCHMARK --help")
    bench.set_defaults(run=_run)


def _run(args: argparse.Namespace, _: list[str]) -> int:
    if args.benchmark == "learning":
        from regate_ds.recipe.learning import command

        return command.main(args.rest)
    if args.benchmark == "text":
        from regate_ds.recipe.tasks.text import bench

        return bench.main(args.rest)
    if args.benchmark == "teacher":
        from regate_ds.recipe.bench import teacher

        teacher.main(args.rest)
        return 0
    from regate_ds.recipe.bench import step

    step.main(args.rest)
    return 0
