"""Our own packages import in one direction, and importing regate_ds loads no framework."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "regate_ds"
ORDER = ("config", "algorithm", "parallel", "data", "teacher", "session", "adapters", "training")
FILES = [
    p
    for p in sorted(ROOT.rglob("*.py"))
    if p.relative_to(ROOT).parts[0].removesuffix(".py") in ORDER
]


def layer(module: str) -> int:
    return ORDER.index(module.split(".")[1])


def imported_by(path: Path) -> list[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    assert not any(isinstance(n, ast.ImportFrom) and n.level for n in nodes), "relative import"
    names = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    names += [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    return [name for name in names if name.startswith("regate_ds.")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_package_imports_only_what_comes_before_it(path: Path):
    own = layer(".".join(path.relative_to(ROOT.parent).with_suffix("").parts))
    upward = [name for name in imported_by(path) if layer(name) > own]
    assert not upward, f"{path.relative_to(ROOT)} imports {upward}"


def test_importing_the_package_loads_no_framework():
    code = (
        "import sys, regate_ds; from regate_ds import Regate, RegateConfig; "
        "print([m for m in ('transformers', 'deepspeed', 'megatron', 'PIL') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
