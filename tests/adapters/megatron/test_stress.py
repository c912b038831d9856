"""Three random cases; `make test-stress` runs 200."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("megatron.core", reason="pip install 'regate-ds[megatron]'")

from tests.adapters.megatron.cases_helper import Case
from tests.adapters.megatron.checks_helper import check
from tests.adapters.megatron.pool_helper import Pool
from tests.adapters.megatron.stress import random_case

SEED = 7


def cases() -> list[Case]:
    rng = random.Random(SEED)
    return [random_case(rng) for _ in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(), ids=str)
def test_a_random_case_equals_the_plain_model(pool: Pool, case: Case):
    pool.run(case.world, check, case)
