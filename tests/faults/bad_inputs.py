"""``python -m tests.faults.bad_inputs [--write]``: what users get wrong, and the line they read.

Each case changes a copy of a small run (data, student, stores, a run that has been stopped), and
gives one command. It must end with exit code 1 or 2 and the line that bad_inputs.txt has for it; no
two cases read the same line. ``--write`` writes the file anew, to be read by a person.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import tempfile
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from regate_ds.cli import main as regate
from tests.faults.bad_input_cases import CASES, Case
from tests.faults.jobs import JOBS, prepare, start, wait

LINES = Path(__file__).with_name("bad_inputs.txt")


def make_template(folder: Path) -> None:
    """Make data, student, stores and a run that has stopped after half of its steps."""
    prepare(folder)
    settings = [
        f"data.cache={folder / 'cache'}",
        f"rank.store={folder / 'orders'}",
        "elision.images.ranking=diversity",
        "run.save_every=6",
    ]
    assert wait(start(JOBS["rank"], folder, folder / "orders", settings)) == [0]
    assert wait(start(JOBS["train on one rank"], folder, folder / "half", settings)) == [0]
    shutil.rmtree(folder / "half" / "model")


def line_of(case: Case, folder: Path) -> str:
    """Return the line that the command ends with, or what is wrong with how it ends."""
    out = folder / "said"
    if (child := os.fork()) == 0:
        _run(case, folder, out)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = out.read_text()
    if code not in (1, 2):
        return f"EXIT CODE {code}: {said[-300:]}"
    if "Traceback" in said:
        return f"TRACEBACK: {said[-600:]}"
    lines = [line for line in said.splitlines() if line.startswith("regate") and ": " in line]
    return lines[-1].replace(str(folder), "HERE") if lines else f"NO LINE: {said[-300:]}"


def _run(case: Case, folder: Path, out: Path) -> None:
    code = 99
    with out.open("w") as file, redirect_stderr(file), redirect_stdout(io.StringIO()):
        try:
            os.environ.update(case.environment)
            os.chdir(folder)
            code = regate([part.replace("HERE", str(folder)) for part in case.arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            file.flush()
            os._exit(code)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(arguments)
    wanted = dict(enumerate(LINES.read_text().splitlines() if LINES.is_file() else []))
    lines: list[str] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        template = Path(name) / "template"
        make_template(template)
        for number, case in enumerate(CASES):
            folder = Path(name) / "HERE" / str(number)
            shutil.copytree(template, folder)
            _retarget(folder, template)
            case.edit(folder)
            line = f"{case.kind} | {line_of(case, folder)}"
            if not args.write and line != wanted.get(number):
                failed.append(f"{line}\n  wanted: {wanted.get(number)}")
            if line in lines or " | regate" not in line:
                failed.append(f"another case's line, or none: {line}")
            lines.append(line)
            shutil.rmtree(folder)
    if args.write:
        LINES.write_text("\n".join(lines) + "\n")
    counts = Counter(case.kind for case in CASES)
    print("\n".join(failed))
    print(f"{len(CASES)} bad inputs, {dict(counts)}: {len(failed)} not as the table says")
    return int(bool(failed))


def _retarget(folder: Path, template: Path) -> None:
    """Let the copy's configuration name the copy."""
    for path in (folder / "run.yaml", folder / "half" / "config.yaml"):
        path.write_text(path.read_text().replace(str(template), str(folder)))


if __name__ == "__main__":
    sys.exit(main())
