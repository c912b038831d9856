"""`regate store info | verify | show`: look into the reference losses."""

from __future__ import annotations

import argparse
from pathlib import Path

from regate_ds.commands.config_argument import add_config, read_config


def add_store(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    store = commands.add_parser("store", help="look into the reference losses")
    asks = store.add_subparsers(dest="ask", required=True, metavar="ASK")
    texts = {
        "info": "counts, and a histogram of the losses",
        "verify": "compare every byte of every file with its checksum",
    }
    for ask, text in texts.items():
        one = asks.add_parser(ask, parents=[debug], help=text, description=text)
        one.add_argument("store", type=Path, metavar="STORE", help="folder of the store")
        one.set_defaults(run=_run)
        if ask == "info":
            how = "full compares every byte of every file first, quick what is read"
            one.add_argument("--verify", choices=("quick", "full"), default="quick", help=how)
    text = "the words of the training answers that the teacher finds hardest and easiest"
    show = asks.add_parser("show", parents=[debug], help=text, description=text)
    show.add_argument("--words", type=int, default=15, metavar="N", help="how many of each")
    add_config(show)
    show.set_defaults(run=_run_words)


def _run(args: argparse.Namespace, _: list[str]) -> int:
    from regate_ds.recipe.reports import store

    if args.ask == "info":
        print(store.info(args.store, args.verify))
    else:
        print(store.verify(args.store))
    return 0


def _run_words(args: argparse.Namespace, _: list[str]) -> int:
    config = read_config(args)

    from regate_ds.recipe.reports import store

    print(store.show(config, num_words=args.words))
    return 0
