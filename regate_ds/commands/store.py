"""`regate store`"""

from __future__ import annotations

import argparse
from pathlib import Path

from regate_ds.commands.config_argument import _add_config


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
