"""The house: rooms import downwards, no file imports itself by a detour, and no folder is full."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "regate_ds"

ROOMS = (
    "algorithm",
    "objectives",
    "parallel",
    "settings",
    "schedule_config",
    "images_config",
    "merge_config",
    "methods_together",
    "config",
    "job",
    "stores",
    "data",
    "families",
    "cost",
    "teacher",
    "ranking",
    "run_schedule",
    "open_step",
    "merge_switch",
    "sparse_step",
    "session",
    "adapters",
    "recipe",
    "commands",
    "cli",
)
"""Each may import those before it; the package's own names are loaded when they are asked for."""

MOST_MODULES, MOST_LINES, MOST_LINES_OF_A_TEST = 15, 250, 400

SEVERAL_HOMES = {"main", "attach"}
"""Public names that each command or host has under the same word."""

FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in names)


def own_imports(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "regate_ds"}


def room(module: str) -> int:
    return ROOMS.index(module.split(".")[1])


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_room_imports_only_rooms_before_it(path: Path):
    if path == PACKAGE / "__init__.py":
        return
    own = room(module_of(path))
    upward = sorted(name for name in own_imports(path) if name == "regate_ds" or room(name) > own)
    assert not upward, f"{path.relative_to(ROOT)} imports {upward}"


def test_no_file_imports_itself_by_way_of_others():
    graph = {module_of(path): own_imports(path) & MODULES for path in FILES}
    left = dict(graph)
    while free := [name for name, needs in left.items() if not needs & left.keys() - {name}]:
        for name in free:
            del left[name]
    assert not left, f"a circle among {sorted(left)}"


def test_the_algorithm_imports_torch_only():
    allowed = {*sys.stdlib_module_names, "torch"}
    for path in (PACKAGE / "algorithm").rglob("*.py"):
        names = {name for name in imports(path) if not name.startswith("regate_ds.algorithm")}
        assert {name.split(".")[0] for name in names} <= allowed, path
        assert not any(name.startswith("torch.distributed") for name in names), path


def test_objectives_import_torch_and_the_algorithm_only():
    ours, others = (
        ("regate_ds.objectives", "regate_ds.algorithm"),
        {*sys.stdlib_module_names, "torch"},
    )
    for path in (PACKAGE / "objectives").rglob("*.py"):
        names = {name for name in imports(path) if not name.startswith(ours)}
        assert {name.split(".")[0] for name in names} <= others, path
        assert not any(name.startswith("torch.distributed") for name in names), path


def test_no_folder_is_full():
    folders = defaultdict(list)
    for path in FILES:
        folders[path.parent].append(path.name)
    full = {str(f.relative_to(ROOT)): len(n) for f, n in folders.items() if len(n) > MOST_MODULES}
    assert not full


def test_no_file_is_long():
    limits = [(path, MOST_LINES) for path in FILES]
    limits += [(path, MOST_LINES_OF_A_TEST) for path in sorted((ROOT / "tests").rglob("*.py"))]
    lengths = {path: len(path.read_text().splitlines()) for path, _ in limits}
    assert not {str(p.relative_to(ROOT)): lengths[p] for p, most in limits if lengths[p] > most}


TASKS = PACKAGE / "recipe" / "tasks"
TASK_FOLDERS = [path.parent for path in sorted(TASKS.glob("*/task.py"))]


@pytest.mark.parametrize("task", TASK_FOLDERS, ids=lambda folder: folder.name)
def test_a_task_knows_nothing_of_the_others(task: Path):
    others = [module_of(each / "__init__.py") for each in TASK_FOLDERS if each != task]
    for path in task.glob("*.py"):
        assert not [name for name in own_imports(path) if name.startswith(tuple(others))]


@pytest.mark.parametrize("task", TASK_FOLDERS, ids=lambda folder: folder.name)
def test_a_public_name_has_one_home(task: Path):
    """Each task calls its own parts by the same names: `place`, `COLOURS`."""
    homes = defaultdict(list)
    for path in FILES:
        if path.parent in TASK_FOLDERS and path.parent != task:
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                homes[node.name].append(module_of(path))
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    if isinstance(target, ast.Name):
                        homes[target.id].append(module_of(path))
    several = {name: at for name, at in homes.items() if len(at) > 1 and not name.startswith("_")}
    assert not {name: at for name, at in several.items() if name not in SEVERAL_HOMES}


def is_library(module: str) -> bool:
    return module == "regate_ds" or room(module) < ROOMS.index("recipe")


def test_examples_use_the_library_alone():
    for path in (ROOT / "launch").rglob("*.py"):
        above = [
            name for name in own_imports(path) if name.split(".")[1:2] in (["recipe"], ["cli"])
        ]
        assert not above, f"{path.relative_to(ROOT)} imports {above}"


def test_importing_the_package_loads_no_framework():
    code = (
        "import sys, regate_ds; from regate_ds import Loop, Regate, RegateConfig; "
        "frameworks = ('transformers', 'accelerate', 'deepspeed', 'megatron', 'PIL'); "
        "print([m for m in frameworks if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
