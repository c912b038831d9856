"""The recipe's student in Megatron-core."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core", reason="pip install 'regate-ds[megatron]'")

from tests.adapters.megatron.cases_helper import Case
from tests.adapters.megatron.pool_helper import Pool
from tests.recipe.engines.checks_helper import BridgeCase, check_weights

CASES = [
    BridgeCase(),
    BridgeCase("qwen2", tied=True),
    BridgeCase("qwen2", layout=Case(tp=2)),
    BridgeCase(tied=True, layout=Case(pp=2)),
    BridgeCase(layout=Case(tp=2, pp=2)),
    BridgeCase("mixtral"),
    BridgeCase("qwen3"),
    BridgeCase("qwen3_moe"),
    BridgeCase("qwen3_moe", rescales=True),
    BridgeCase("qwen3", layout=Case(tp=2, sp=True)),
    BridgeCase("qwen3_moe", layout=Case(tp=2, sp=True)),
    BridgeCase("qwen3_moe", layout=Case(tp=2, sp=True, dp=2, ep=2)),
    BridgeCase("mixtral", layout=Case(tp=2, sp=True)),
    BridgeCase("mixtral", layout=Case(dp=2, ep=2)),
    BridgeCase("mixtral", layout=Case(tp=2, sp=True, dp=2, ep=2)),
    BridgeCase("mixtral", tied=True, layout=Case(pp=2, dp=2, ep=2)),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_give_the_same_losses_and_come_back_unchanged(pool: Pool, case: BridgeCase):
    assert max(pool.run(case.layout.world, check_weights, case)) < 1e-5
