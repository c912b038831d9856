"""One pool of workers for all tests of Megatron-core; no test leaves a job behind."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from regate_ds.job.ranks import RANK_NAMES
from tests.adapters.megatron.pool_helper import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    made = Pool()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _announces_no_job() -> Iterator[None]:
    """Fail the test that leaves a rank in the environment: the commands of later tests would take
    it for theirs, and its port with it."""
    before = {name: os.environ.get(name) for name in RANK_NAMES}
    yield
    assert {name: os.environ.get(name) for name in RANK_NAMES} == before
