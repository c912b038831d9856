"""``python -m tests.recipe.chat_helper FOLDER NAME...``: score, train and evaluate tiny students
that have processors; each command in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.recipe.rank_helper import in_a_process
from tests.support.chat_corpus import make_chat_corpus


def run_all(folder: Path, names: list[str]) -> int:
    for name in names:
        path = str(make_chat_corpus(folder / name, name))
        for command in ("teacher", "train", "eval"):
            what = path if command != "eval" else str(folder / name / "run")
            if code := in_a_process([command, what, "--debug"]):
                print(f"{name}: regate {command} failed", file=sys.stderr)
                return code
    return 0


if __name__ == "__main__":
    sys.exit(run_all(Path(sys.argv[1]), sys.argv[2:]))
