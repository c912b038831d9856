"""`regate store info | verify | show`: look into a store of reference losses."""

from __future__ import annotations

import argparse
from pathlib import Path

from regate_ds.commands.config_argument import add_config, read_config


def add_store(commands: argparse._SubParsersAction, debug: argparse.ArgumentParser) -> None:
    store = commands.add_parser("store", help="look into the reference losses")
    actions = store.add_subparsers(dest="action", required=True, metavar="ACTION")
    texts = {
        "info": "print counts, and a histogram of the losses",
        "verify": "compare every byte of every file with its checksum",
    }
    for action, text in texts.items():
        parser = actions.add_parser(action, parents=[debug], help=text, description=text)
        parser.add_argument("store", type=Path, metavar="STORE", help="folder of the store")
        parser.set_defaults(run=_run)
        if action == "info":
            text = "full compares every byte of every file first; quick compares what is read"
            parser.add_argument("--verify", choices=("quick", "full"), default="quick", help=text)
    text = "print the words of the training answers that the teacher finds hardest and easiest"
    show = actions.add_parser("show", parents=[debug], help=text, description=text)
    show.add_argument("--words", type=int, default=15, metavar="N", help="how many of each")
    add_config(show)
    show.set_defaults(run=_run_words)


def _run(args: argparse.Namespace, _: list[str]) -> int:
    from regate_ds.recipe.reports import store

    if args.action == "info":
        print(store.info(args.store, args.verify))
    else:
        print(store.verify(args.store))
    return 0


def _run_words(args: argparse.Namespace, _: list[str]) -> int:
    config = read_config(args)

    from regate_ds.recipe.reports import store

    print(store.show(config, num_words=args.words))
    return 0
