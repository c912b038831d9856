"""DeepSpeed's own pipeline: two stages, ragged micro-batches, against one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.pipeline_checks import (
    LARGE,
    SMALL,
    check_data_parallel_pipelines,
    check_pipelines,
)
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.slow


def failures(check: Callable[..., None], world_size: int, folder: Path) -> dict[str, str]:
    run_ranks(check, world_size, str(folder))
    found: dict[str, str] = {}
    for path in sorted(folder.glob("rank*.json")):
        for name, message in json.loads(path.read_text()).items():
            found[name] = found.get(name, "") + f"{path.stem}: {message}\n"
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict[str, str]:
    return failures(check_pipelines, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> dict[str, str]:
    return failures(check_data_parallel_pipelines, 4, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("name", [*SMALL, "disabled", "memory", "refusals", "short data"])
def test_two_stages(name: str, two: dict[str, str]):
    assert name not in two, two[name]


@pytest.mark.parametrize("name", LARGE)
def test_two_stages_of_two_data_ranks(name: str, four: dict[str, str]):
    assert name not in four, four[name]
