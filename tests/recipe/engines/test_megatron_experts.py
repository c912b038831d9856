"""A student with experts and `parallel`: the DeepSpeed host's run, experts cut or shared.

Its decoder is Qwen3-MoE's, with a norm on queries and keys and heads of their own size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core", reason="pip install 'regate-ds[megatron]'")

from tests.adapters.megatron.cases_helper import Case
from tests.adapters.megatron.pool_helper import Pool
from tests.recipe.engines.runs_helper import Reading, Run, check_reading, train
from tests.recipe.engines.test_megatron import (
    HALF,
    TIMEOUT_SECONDS,
    TIMES,
    require_equal_runs,
    rows,
    start,
    weights,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with its reference losses and a run on DeepSpeed."""
    folder = tmp_path_factory.mktemp("recipe")
    start("tests.recipe.engines.reference_helper", str(folder), "qwen3_moe")
    return folder


CUTS: list[tuple[int, str, tuple[str, ...]]] = [
    (1, "tensor: 1", ()),
    (2, "expert: 2", (HALF,)),
    (2, "tensor: 2, sequence: true", ()),
    (2, "tensor: 2, sequence: true, expert: 2, recompute: full", ()),
    (4, "pipeline: 2, expert: 2, distributed_optimizer: true", (HALF,)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "parallel", "more"), CUTS, ids=[c[1] for c in CUTS])
def test_every_cut_makes_the_run_of_one_deepspeed_rank(
    pool: Pool, corpus: Path, world: int, parallel: str, more: tuple[str, ...]
):
    out = parallel.replace(": ", "").replace(", ", "-")
    pool.run(world, train, Run(corpus, out, (f"parallel={{{parallel}}}", *more)), TIMEOUT_SECONDS)
    require_equal_runs(corpus / out, corpus / "deepspeed")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Case(dp=2, ep=2), Case(tp=2, sp=True)], ids=str)
def test_a_rank_reads_its_own_experts(pool: Pool, corpus: Path, layout: Case):
    pool.run(layout.world, check_reading, Reading(corpus, layout))


@pytest.mark.slow
def test_a_resumed_run_equals_one_that_never_stopped(pool: Pool, corpus: Path):
    cut = "parallel={expert: 2, distributed_optimizer: true}"
    common = (cut, HALF, "run.save_every=3")
    pool.run(2, train, Run(corpus, "whole", common), TIMEOUT_SECONDS)
    pool.run(2, train, Run(corpus, "resumed", common, stop_after=4), TIMEOUT_SECONDS)
    pool.run(2, train, Run(corpus, "resumed", (*common, "run.resume=true")), TIMEOUT_SECONDS)
    whole, resumed = (
        [{k: v for k, v in row.items() if k not in TIMES} for row in rows(corpus / name)]
        for name in ("whole", "resumed")
    )
    assert resumed == whole
    mine, theirs = weights(corpus / "resumed"), weights(corpus / "whole")
    assert all(torch.equal(mine[name], weight) for name, weight in theirs.items())


CHANGES = [
    ("expert: 2", (HALF,), "tensor: 2, sequence: true, expert: 2", ()),
    ("tensor: 2, sequence: true", (), "pipeline: 2", ()),
]


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "more", "others", "more_then"), CHANGES)
def test_a_run_goes_on_under_another_layout(
    pool: Pool, corpus: Path, saved: str, more: tuple, others: str, more_then: tuple
):
    def cut(axes: str) -> str:
        return f"parallel={{{axes}, distributed_optimizer: true}}"

    out, every = f"from {saved}".replace(": ", ""), "run.save_every=3"
    begun = Run(corpus, out, (cut(saved), every, *more), stop_after=4)
    pool.run(2, train, begun, TIMEOUT_SECONDS)
    pool.run(
        2,
        train,
        Run(corpus, out, (cut(others), every, *more_then, "run.resume=true")),
        TIMEOUT_SECONDS,
    )
    require_equal_runs(corpus / out, corpus / "deepspeed")
