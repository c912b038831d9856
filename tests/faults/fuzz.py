"""``python -m tests.faults.fuzz [--inputs N] [--seed S]``: changed inputs, and what is said.

In turn, an input of each kind is changed at random and read. It is *read*, or *refused* by a
ValueError of one line. It must be neither a *traceback* (any other error, or lines that no user can
read), nor take longer than ten seconds (*hang*), nor be *accepted* where it was made wrong. A line
that starts with the number of the input repeats it: ``--only NUMBER``.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.faults.fuzz_subjects import MUST, SUBJECTS, Subject, renew

PATIENCE = 10
"""Seconds that one input may take."""

FAULTS = ("traceback", "hang", "accepted")


class Hang(Exception):
    """An input took too long."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of one input")
    args = parser.parse_args(arguments)
    numbers = range(args.inputs) if args.only is None else [args.only]
    ends = tried(numbers, args.seed)
    for subject in SUBJECTS:
        own = {end: count for (name, end), count in ends.items() if name == subject.name}
        print(f"{subject.name}: {sum(own.values())} inputs, {own}")
    return int(any(end in FAULTS for _, end in ends))


def tried(numbers: Iterable[int], seed: int) -> Counter[tuple[str, str]]:
    """Try inputs by their numbers; return how many of each kind had which end."""
    ends: Counter[tuple[str, str]] = Counter()
    signal.signal(signal.SIGALRM, _too_long)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for subject in SUBJECTS:
            (folder / subject.name).mkdir()
            subject.make(folder / subject.name)
            subject.read(folder / subject.name)
        for number in numbers:
            subject = SUBJECTS[number % len(SUBJECTS)]
            renew(folder / subject.name, folder / "changed")
            end, said = _end_of(subject, random.Random(f"{seed} {number}"), folder / "changed")
            ends[subject.name, end] += 1
            if end in FAULTS:
                print(f"{number}: {subject.name}: {end}: {said}", flush=True)
    return ends


def _end_of(subject: Subject, draw: random.Random, folder: Path) -> tuple[str, str]:
    how = subject.change(draw, folder)
    signal.alarm(PATIENCE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            subject.read(folder)
    except ValueError as error:
        said, own = str(error), type(error).__module__.partition(".")[0]
        is_told = (type(error) is ValueError or own == "regate_ds") and said and "\n" not in said
        return ("refused" if is_told else "traceback"), repr(error)
    except Hang:
        return "hang", f"longer than {PATIENCE} s"
    except Exception as error:  # the end that is looked for
        return "traceback", repr(error)
    finally:
        signal.alarm(0)
    return ("accepted" if how == MUST else "read"), how


def _too_long(*_: object) -> None:
    raise Hang


if __name__ == "__main__":
    sys.exit(main())
