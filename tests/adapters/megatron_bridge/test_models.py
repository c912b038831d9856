"""Elided steps of Megatron-Bridge's models equal the per-layer oracle, in several layouts.

`make test-bridge` runs this, in an environment of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="pip install 'regate-ds[megatron]'")
if importlib.util.find_spec("megatron.bridge") is None:
    pytest.skip("make test-bridge installs Megatron-Bridge", allow_module_level=True)

from tests.adapters.megatron.cases_helper import BRIDGED, Case
from tests.adapters.megatron.checks_helper import run_step
from tests.adapters.megatron.loop_helper import check_disabled
from tests.adapters.megatron.pool_helper import Pool
from tests.adapters.megatron_bridge.oracle_helper import (
    check_against,
    check_host_alone,
    write_oracle,
)

TIMEOUT = 400


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    # What Bridge imports has threads of its own.
    made = Pool(max_threads=120)
    yield made
    made.close()


CASES = [
    Case(model="qwen25_vl"),
    Case(model="qwen25_vl", first_layer=0, rows=3, image_share=0.5, recompute="full"),
    Case(model="qwen25_vl", row_format="ragged", rows=3, image_share=0.3),
    Case(model="qwen25_vl", last_layer=3, image_share=0.5),
    Case(model="qwen25_vl", pp=2, image_share=0.5),
    Case(model="qwen25_vl", tp=2, sp=True, image_share=0.5),
    Case(model="qwen25_vl", dp=2, first_layer=0, image_share=0.5),
    Case(model="qwen3_vl"),
    Case(model="qwen3_vl", first_layer=0, rows=3, image_share=0.5, recompute="full"),
    Case(model="qwen3_vl", first_layer=2, image_share=0.5, recompute="selective"),
    Case(model="qwen3_vl", row_format="ragged", rows=3, image_share=0.3),
    Case(model="qwen3_vl", first_layer=3, last_layer=4, num_layers=5, image_share=0.5),
    Case(model="qwen3_vl", pp=2, image_share=0.5, recompute="full"),
    Case(model="qwen3_vl", tp=2, sp=True, image_share=0.5),
    Case(model="qwen3_vl", tp=2, first_layer=0),
    Case(model="qwen3_vl", cp=2, image_share=0.5),
    Case(model="qwen3_vl", cp=2, first_layer=0, row_format="ragged", rows=3, image_share=0.5),
    Case(model="qwen3_vl", dp=2, first_layer=2, image_share=0.5),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_equals_the_per_layer_oracle(pool: Pool, case: Case, tmp_path: Path):
    oracle = tmp_path / "oracle.pt"
    pool.run(1, write_oracle, (case, oracle), timeout=TIMEOUT)
    reports = pool.run(case.world, check_against, (case, oracle), timeout=TIMEOUT)
    print(f"{case}: gradient {max(report.gradient for report in reports):.1e}")


@pytest.mark.parametrize(
    ("case", "is_right"),
    [
        (Case(model="qwen3_vl", tp=2), True),
        (Case(model="qwen3_vl", tp=2, sp=True), False),
        (Case(model="qwen3_vl", recompute="full"), False),
    ],
    ids=str,
)
def test_what_bridge_itself_loses_of_the_towers_gradient(
    pool: Pool, case: Case, is_right: bool, tmp_path: Path
):
    """Deepstack features under sequence parallelism and under full recomputation (Bridge 0.6.2).

    When this fails, the two exceptions in oracle_helper.py may go.
    """
    oracle = tmp_path / "oracle.pt"
    pool.run(1, write_oracle, (replace(case, dense=True), oracle), timeout=TIMEOUT)
    found = pool.run(case.world, check_host_alone, (case, oracle), timeout=TIMEOUT)
    assert all(("vision_model" in text) != is_right for text in found), found
    assert not any("language_model" in text or "layers.3" in text for text in found)


@pytest.mark.parametrize("model", BRIDGED)
def test_off_is_the_hosts_own_run_bit_for_bit(pool: Pool, model: str):
    # Bridge's own run of Qwen2.5-VL cannot send over gloo: its tensors are not contiguous.
    more = {"pp": 2} if model == "qwen3_vl" else {"dp": 2}
    for case in (Case(model=model), Case(model=model, **more)):
        pool.run(case.world, check_disabled, case, timeout=TIMEOUT)


def test_elided_tokens_that_would_miss_features_are_refused_by_name(pool: Pool):
    case = Case(model="qwen3_vl", last_layer=3, first_layer=2)
    with pytest.raises(AssertionError, match="adds image features behind its first 2 layers"):
        pool.run(1, run_step, case, timeout=TIMEOUT)
