"""`regate tokenizer CONFIG --out FOLDER --size N`: a tokenizer of the data, and its student."""

from __future__ import annotations

import argparse
from pathlib import Path

from regate_ds.commands.config_argument import add_config, read_config


def add_tokenizer(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    text = "train a tokenizer on the training set, and write the student that reads by it"
    parser = commands.add_parser("tokenizer", parents=[debug], help=text, description=text)
    add_config(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where the new student is written"
    )
    parser.add_argument(
        "--size", type=int, required=True, metavar="N", help="tokens of the new vocabulary, at most"
    )
    parser.add_argument(
        "--by", metavar="FIELD", help="count apart by this field of the records, such as source"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace, _: list[str]) -> int:
    config = read_config(args)

    from regate_ds.recipe.vocabulary.report import table_of
    from regate_ds.recipe.vocabulary.specialise import specialise

    counts = specialise(config, args.out, size=args.size, by=args.by)
    print("\n".join(table_of(counts)))
    print(f"{args.out}: set model.path to it")
    return 0
