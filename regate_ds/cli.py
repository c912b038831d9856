"""The `regate` command. Sub-commands import what they need when they run: --help is quick.

Also started as ``python -m regate_ds.cli``, by the deepspeed launcher, torchrun or srun.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from regate_ds.job.errors import USER_ERRORS, tell
from regate_ds.job.preemption import EXIT_CODE, Preempted, heed


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; 0 on success, 1 on an error of one line, 2 on wrong usage.

    75 is a training run that was asked to end and has saved.
    """
    heed()
    args, rest = _parse(_without_local_rank(sys.argv[1:] if argv is None else argv))
    try:
        return args.run(args, rest)
    except KeyboardInterrupt:
        print(f"regate {args.command}: interrupted", file=sys.stderr)
        return 130
    except Preempted as stop:
        if str(stop):
            print(f"regate {args.command}: {stop}", file=sys.stderr)
        return EXIT_CODE
    except USER_ERRORS as error:
        if args.debug:
            raise
        tell(args.command, error)
        return 1


def _without_local_rank(argv: Sequence[str]) -> list[str]:
    """Drop what the deepspeed launcher puts before our arguments; the environment has it too."""
    launcher = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    launcher.add_argument("--local_rank", "--local-rank", type=int)
    return launcher.parse_known_args(argv)[1]


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "bench":
        parser.error(f"unknown arguments to {args.command}: {' '.join(rest)}")
    return args, rest


def _parser() -> argparse.ArgumentParser:
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(
        prog="regate", description="Train multimodal LLMs on the tokens that still teach them."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_data,
        _add_teacher,
        _add_store,
        _add_train,
        _add_eval,
        _add_compare,
        _add_bench,
    ):
        add(commands, debug)
    _add_doctor(commands, debug)
    return parser


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


def _add_teacher(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    text = "compute the reference losses of the training set, once; finished parts are skipped"
    teacher = commands.add_parser("teacher", parents=[debug], help=text, description=text)
    _add_config(teacher)
    teacher.set_defaults(run=_teacher)


def _add_store(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    store = commands.add_parser("store", help="look into the reference losses")
    asks = store.add_subparsers(dest="ask", required=True, metavar="ASK")
    texts = {
        "info": "counts, and a histogram of the losses",
        "verify": "compare every byte of every file with its checksum",
    }
    for ask, text in texts.items():
        one = asks.add_parser(ask, parents=[debug], help=text, description=text)
        one.add_argument("store", type=Path, metavar="STORE", help="folder of the store")
        one.set_defaults(run=_store)
        if ask == "info":
            how = "full compares every byte of every file first, quick what is read"
            one.add_argument("--verify", choices=("quick", "full"), default="quick", help=how)
    text = "the words of the training answers that the teacher finds hardest and easiest"
    show = asks.add_parser("show", parents=[debug], help=text, description=text)
    show.add_argument("--words", type=int, default=15, metavar="N", help="how many of each")
    _add_config(show)
    show.set_defaults(run=_store_words)


def _add_train(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    text = (
        "train; elision.enabled=false is the host's own run, elision.keep_share=1.0 the dense one"
    )
    train = commands.add_parser("train", parents=[debug], help=text, description=text)
    _add_config(train)
    train.set_defaults(run=_train)


def _add_eval(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    text = "measure the accuracy of a finished run on held-out questions"
    evaluate = commands.add_parser("eval", parents=[debug], help=text, description=text)
    evaluate.add_argument("run_folder", type=Path, metavar="RUN", help="folder of the run")
    evaluate.set_defaults(run=_eval)


def _add_compare(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    text = "put runs side by side: quality, tokens, time, memory"
    compare = commands.add_parser("compare", parents=[debug], help=text, description=text)
    compare.add_argument("run_folders", type=Path, nargs="+", metavar="RUN")
    compare.add_argument("--out", type=Path, help="folder for compare.json and the pictures")
    compare.set_defaults(run=_compare)


def _add_bench(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    bench = commands.add_parser(
        "bench", parents=[debug], add_help=False, help="measure speed and memory against baselines"
    )
    bench.set_defaults(run=_bench)


def _add_doctor(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    text = "show versions, devices and what is missing; fails only if something required is"
    doctor = commands.add_parser("doctor", parents=[debug], help=text, description=text)
    doctor.add_argument(
        "config", type=Path, nargs="?", metavar="CONFIG", help="also judge memory, disk and groups"
    )
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="as of train")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(run=_doctor)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, as in configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as run.steps=100, in YAML"
    )


def _data_digits(args: argparse.Namespace, _: list[str]) -> int:
    from regate_ds.recipe.tasks.digits.scenes import build_digits

    build_digits(
        args.out, num_train=args.train, num_test=args.test, seed=args.seed, num_frames=args.frames
    )
    return 0


def _teacher(args: argparse.Namespace, _: list[str]) -> int:
    from regate_ds.recipe.config.tree import load_config

    config = load_config(args.config, args.overrides)

    from regate_ds.commands.output import run_teacher

    run_teacher(config)
    return 0


def _store(args: argparse.Namespace, _: list[str]) -> int:
    from regate_ds.recipe.reports import store as store_report

    if args.ask == "info":
        print(store_report.info(args.store, args.verify))
    else:
        print(store_report.verify(args.store))
    return 0


def _store_words(args: argparse.Namespace, _: list[str]) -> int:
    from regate_ds.recipe.config.tree import load_config

    config = load_config(args.config, args.overrides)

    from regate_ds.recipe.reports.store import show

    print(show(config, num_words=args.words))
    return 0


def _train(args: argparse.Namespace, _: list[str]) -> int:
    from regate_ds.recipe.config.tree import load_config

    config = load_config(args.config, args.overrides)

    from regate_ds.commands.output import train

    train(config)
    return 0


def _eval(args: argparse.Namespace, _: list[str]) -> int:
    from regate_ds.commands.output import evaluate_run

    evaluate_run(args.run_folder)
    return 0


def _compare(args: argparse.Namespace, _: list[str]) -> int:
    from regate_ds.recipe.reports.compare import compare_runs

    print(compare_runs(args.run_folders, out=args.out))
    return 0


def _bench(_: argparse.Namespace, rest: list[str]) -> int:
    from regate_ds.recipe.bench import step as bench

    bench.main(rest)
    return 0


def _doctor(args: argparse.Namespace, _: list[str]) -> int:
    from regate_ds.recipe.config.tree import load_config

    config = None if args.config is None else load_config(args.config, args.overrides)

    from regate_ds.job.ranks import discover
    from regate_ds.recipe.doctor import examine as doctor

    findings = doctor.examine(config)
    if discover().rank == 0:
        print(doctor.as_json(findings) if args.json else doctor.as_text(findings))
    return 1 if doctor.lacks_required(findings) else 0


if __name__ == "__main__":
    sys.exit(main())
