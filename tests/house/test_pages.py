"""Pages that lead through an addition are carried out, step by step, in a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.house.test_docs import blocks
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

NEW = re.compile(r"into `([\w/]+/)`, as `(\w+\.py)`")
"""How the paragraph above a block names the file that the block is."""

CHANGED = re.compile(r"`((?:tests|regate_ds)/[\w/]+\.py)`")
"""The file that a block of added lines changes."""


def carry_out(page: str, root: Path) -> None:
    """Copy the package and its tests, and write or change the files that a page says."""
    for name in ("regate_ds", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    text = (ROOT / "docs" / page).read_text()
    for block, _ in blocks(ROOT / "docs" / page):
        paragraph = _paragraph_above(text, block)
        if block.startswith('"""'):
            ((folder, file),) = NEW.findall(paragraph)
            path = root / folder / file
            assert not path.exists(), f"{page} writes {path.name}, which is in the package"
            path.write_text(block + "\n")
        elif "\n+" in block:
            (changed,) = CHANGED.findall(paragraph)
            (root / changed).write_text(_changed((root / changed).read_text(), block))


def _paragraph_above(text: str, block: str) -> str:
    before = text[: text.index(block)].rpartition("```")[0]
    return " ".join(before.rstrip().rpartition("\n\n")[2].split())


def _changed(text: str, diff: str) -> str:
    """Put each added line behind the line that the page shows before it."""
    lines, at = text.splitlines(), -1
    for line in diff.splitlines():
        if line.startswith("+"):
            lines.insert(at + 1, line[1:])
            at += 1
        else:
            at = lines.index(line[1:])
    return "\n".join(lines) + "\n"


def run(root: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run_tests(root: Path, *paths: str) -> None:
    run(root, "pytest", "-q", "-p", "no:cacheprovider", *paths)


def test_the_page_on_methods_can_be_followed(tmp_path):
    carry_out("add_a_method.md", tmp_path)
    run_tests(tmp_path, "tests/algorithm/test_progress.py", "tests/algorithm/test_scores.py")
    run_tests(tmp_path, "tests/session/test_config.py")
    (file,) = (block for block, _ in blocks(ROOT / "docs/add_a_method.md") if "elision:" in block)
    given = repr(yaml.safe_load(file)["elision"])
    code = f"from tests.support.planning import config_of; c = config_of(**{given})"
    checked = f"{code}; assert type(c.score).__name__ == 'Progress' and c.score.slow == 0.8"
    (tmp_path / "reads_file.py").write_text(checked)
    run(tmp_path, "reads_file")


def test_the_page_on_frameworks_can_be_followed(tmp_path):
    carry_out("add_a_framework.md", tmp_path)
    run_tests(tmp_path, "tests/adapters/test_plain_torch.py")


def test_the_page_on_models_can_be_followed(tmp_path):
    carry_out("add_a_model.md", tmp_path)
    names = ("lfm2_moe", "minicpm_ocr")
    run(tmp_path, "tests.families.run", *names, "--rows", "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["family"], row["verdict"]) for row in rows] == [(name, "exact") for name in names]
    assert rows[1]["empty_image"] == rows[1]["told_apart"] == "yes"
