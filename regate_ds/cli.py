"""The `regate` command. Sub-commands import what they need when they run, so that --help is quick.

The deepspeed launcher, torchrun and srun start it as ``python -m regate_ds.cli``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from regate_ds.commands.bench import add_bench
from regate_ds.commands.compare import add_compare
from regate_ds.commands.data import add_data
from regate_ds.commands.doctor import add_doctor
from regate_ds.commands.estimate import add_estimate
from regate_ds.commands.evaluate import add_eval
from regate_ds.commands.pretrain import add_pretrain
from regate_ds.commands.rank import add_rank
from regate_ds.commands.store import add_store
from regate_ds.commands.teacher import add_teacher
from regate_ds.commands.tokenizer import add_tokenizer
from regate_ds.commands.train import add_train
from regate_ds.job.arguments_file import OPTION, from_file
from regate_ds.job.errors import USER_ERRORS, print_error
from regate_ds.job.preemption import EXIT_CODE, Preempted, restore_signals

COMMANDS = (
    add_data,
    add_tokenizer,
    add_teacher,
    add_rank,
    add_store,
    add_train,
    add_pretrain,
    add_eval,
    add_compare,
    add_bench,
    add_estimate,
    add_doctor,
)
"""The sub-commands, in the order of --help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return the exit code.

    0 is success, 1 an error (printed in one line), 2 wrong usage, 75 a training run that was asked
    to end and has saved, 130 an interrupt from the keyboard.
    """
    restore_signals()
    try:
        given = from_file(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        print_error(OPTION, error)
        return 1
    args, rest = _parse(_without_local_rank(given))
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
        print_error(args.command, error)
        return 1


def _without_local_rank(argv: Sequence[str]) -> list[str]:
    """Remove what the deepspeed launcher adds to our arguments; the environment has it too."""
    launcher = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    launcher.add_argument("--local_rank", "--local-rank", type=int)
    return launcher.parse_known_args(argv)[1]


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest:
        parser.error(f"unknown arguments to {args.command}: {' '.join(rest)}")
    return args, rest


def _parser() -> argparse.ArgumentParser:
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(
        prog="regate", description="Train multimodal LLMs on the tokens that still teach them."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands, debug)
    return parser


if __name__ == "__main__":
    sys.exit(main())
