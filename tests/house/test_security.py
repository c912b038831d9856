"""What docs/security.md says of files and of the network, against the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "regate_ds"

OBJECT_COLLECTIVES = re.compile(
    r"(all_gather_object|gather_object|broadcast_object_list|scatter_object_list|gather_objects)\("
)


def sources() -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), path.read_text()


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    """Yield the package's calls of a dotted name, such as ``np.load``, with their files."""
    for file, text in sources():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
                yield file, node


def test_the_page_lists_every_file_that_pickles_between_ranks():
    used = {file for file, text in sources() if OBJECT_COLLECTIVES.search(text)}
    page = (ROOT / "docs" / "security.md").read_text()
    assert set(re.findall(r"^\| `(\S+\.py)` \|", page, re.MULTILINE)) == used


@pytest.mark.parametrize(
    ("name", "keyword", "value"),
    [("np.load", "allow_pickle", "False"), ("torch.load", "weights_only", "True")],
)
def test_nothing_is_unpickled_from_a_file(name: str, keyword: str, value: str):
    found = list(calls(name))
    assert found
    for file, call in found:
        given = {each.arg: ast.unparse(each.value) for each in call.keywords}
        assert given.get(keyword) == value, f"{file}, line {call.lineno}"


def test_yaml_is_read_by_one_safe_loader():
    loads = {file for file, text in sources() if re.search(r"yaml\.(\w*load\w*)\(", text)}
    assert loads == {"settings/yaml.py"}
    assert "class _Reader(yaml.SafeLoader)" in Path(PACKAGE, "settings/yaml.py").read_text()


def test_no_code_of_a_model_folder_is_run():
    for file, text in sources():
        assert not re.search(r"trust_remote_code\s*=\s*(?!False)", text), file
        assert not re.search(r"\bpickle\.loads?\(|\bexec\(", text), file
