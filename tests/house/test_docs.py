"""Every block of code in README.md and docs/ is run by a test, or says that it is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])

NOT_RUN = "<!-- not run"
PRINTED = re.compile(r"\bprinted\b")
"""In the line above what a command wrote: nothing that a reader could run."""

RUN_BY = {
    "README.md": {
        "make test": ".ci/run",
        "teacher = Teacher(": "tests/recipe/readme_example_helper.py",
        "engine, _, loader, _ = deepspeed.initialize(": "tests/recipe/readme_example_helper.py",
    },
    "configuration.md": {
        "train_tokenizer(texts, vocab_size=448)": "tests/recipe/config/test_tree.py",
        "path: null": "tests/recipe/config/test_tree.py",
    },
    "trainer.md": {
        "teacher = Teacher(": "launch/examples/hf_trainer.py",
        "trainer = RegateTrainer(": "launch/examples/hf_trainer.py",
    },
    "deepspeed_loop.md": {
        "teacher = Teacher(": "launch/examples/deepspeed_loop.py",
        "regate = attach(": "launch/examples/deepspeed_loop.py",
    },
}
"""Page, a line of the block, and what runs it: a test, or a script that a test runs, which then has
the block word for word."""

EXAMPLES = "launch/examples/"


def blocks(page: Path) -> list[tuple[str, str]]:
    """Each block of code, and the line above it. Indented ones start after an empty line."""
    lines, found = page.read_text().splitlines(), []
    number = 0
    while number < len(lines):
        is_fence = lines[number].lstrip().startswith("```")
        is_indented = lines[number].startswith("    ") and number and not lines[number - 1].strip()
        if not is_fence and not is_indented:
            number += 1
            continue
        above, start = _above(lines, number), number + is_fence
        number = start
        while number < len(lines) and not _ends(lines[number], is_fence):
            number += 1
        found.append(("\n".join(lines[start:number]), above))
        number += 1
    return found


def _ends(line: str, is_fence: bool) -> bool:
    return line.lstrip().startswith("```") if is_fence else not line.startswith("    ")


def _above(lines: list[str], number: int) -> str:
    return next((line for line in reversed(lines[:number]) if line.strip()), "")


CODE = [(page, block, above) for page in PAGES for block, above in blocks(page)]


@pytest.mark.parametrize(("page", "block", "above"), CODE, ids=lambda x: getattr(x, "name", None))
def test_a_block_is_run_or_says_that_it_is_not(page: Path, block: str, above: str):
    if above.startswith(NOT_RUN) or PRINTED.search(above):
        return
    runners = [by for line, by in RUN_BY.get(page.name, {}).items() if line in block]
    assert runners, (
        f"{page.name}: run this block by a test and name it in RUN_BY, or write "
        f"'{NOT_RUN}: why -->' above it:\n{block}"
    )
    runner = (ROOT / runners[0]).read_text()
    if runners[0].startswith(EXAMPLES):
        assert block in runner, f"{runners[0]} has it otherwise:\n{block}"


@pytest.mark.parametrize("page", RUN_BY)
def test_what_runs_a_block_is_named_for_blocks_that_are_there(page: str):
    (path,) = (path for path in PAGES if path.name == page)
    text = path.read_text()
    for line, by in RUN_BY[page].items():
        assert line in text, f"{page} no longer has {line!r}"
        assert (ROOT / by).is_file()
