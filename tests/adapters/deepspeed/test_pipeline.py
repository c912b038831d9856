"""DeepSpeed's own pipeline: two stages, ragged micro-batches, against one process."""

from __future__ import annotations

import pytest

from tests.adapters.deepspeed.pipeline_helper import (
    LARGE,
    OTHERS,
    SMALL,
    check_data_parallel_pipelines,
    check_pipelines,
)
from tests.support.ranks import Failures, failures_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Failures:
    return failures_of(check_pipelines, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Failures:
    return failures_of(check_data_parallel_pipelines, 4, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("name", [*SMALL, *OTHERS])
def test_two_stages(name: str, two: Failures):
    assert name not in two, "\n".join(two[name])


@pytest.mark.parametrize("name", LARGE)
def test_two_stages_of_two_data_ranks(name: str, four: Failures):
    assert name not in four, "\n".join(four[name])
