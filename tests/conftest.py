"""One pool of workers for all tests of Megatron-core."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.adapters.megatron.pool_helper import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    made = Pool()
    yield made
    made.close()
