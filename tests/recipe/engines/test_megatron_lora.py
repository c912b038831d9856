"""LoRA with `parallel`: peft's own losses, gradients and run, and files that peft loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

pytest.importorskip("megatron.core", reason="pip install 'regate-ds[megatron]'")

from regate_ds.recipe.students.load import load_student
from tests.adapters.megatron.cases_helper import Case
from tests.adapters.megatron.pool_helper import Pool
from tests.recipe.engines.lora_helper import (
    ALL,
    AdapterCase,
    check_adapters,
    check_dropout,
    check_frozen,
)
from tests.recipe.engines.runs_helper import Reading, Run, train, train_with_own_attention
from tests.recipe.engines.test_megatron import (
    HALF,
    TIMEOUT_SECONDS,
    TIMES,
    require_equal_runs,
    rows,
    start,
    weights,
)

CASES = [
    AdapterCase(),
    AdapterCase("qwen2", layout=Case(tp=2)),
    AdapterCase(layout=Case(tp=2, sp=True)),
    AdapterCase(targets=("q_proj", "v_proj", "up_proj"), layout=Case(tp=2, sp=True)),
    AdapterCase(targets=("down_proj",), layout=Case(tp=2)),
    AdapterCase("mixtral", targets=ALL[:4], layout=Case(tp=2, sp=True)),
    AdapterCase("qwen2", fused_norm=True, layout=Case(tp=2, sp=True)),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_adapters_gradients_are_pefts(pool: Pool, case: AdapterCase):
    assert max(max(pool.run(case.layout.world, check_adapters, case))) < 1e-5


@pytest.mark.slow
def test_dropout_is_one_on_tensor_ranks_that_see_the_same_input(pool: Pool):
    (columns, rows_), (columns_too, rows_too) = pool.run(2, check_dropout, Case(tp=2))
    assert torch.equal(columns, columns_too)
    assert not torch.equal(rows_, rows_too)


LORA = f"model.lora={{rank: 2, alpha: 8, target_modules: [{', '.join(ALL)}]}}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with its reference losses and a run of peft's adapters on DeepSpeed."""
    folder = tmp_path_factory.mktemp("recipe")
    start("tests.recipe.engines.reference_helper", str(folder), "llama", LORA)
    return folder


CUTS: list[tuple[int, str, tuple[str, ...]]] = [
    (1, "tensor: 1", ()),
    (2, "tensor: 2, sequence: true, recompute: full", ()),
    (2, "pipeline: 2, virtual: 2", ()),
    (2, "context: 2, row_format: ragged", ()),
    (4, "tensor: 2, pipeline: 2, distributed_optimizer: true", ()),
    (2, "distributed_optimizer: true", (HALF,)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "parallel", "more"), CUTS, ids=[c[1] for c in CUTS])
def test_every_cut_makes_pefts_run_on_one_deepspeed_rank(
    pool: Pool, corpus: Path, world: int, parallel: str, more: tuple[str, ...]
):
    out = parallel.replace(": ", "").replace(", ", "-")
    kind = train_with_own_attention if "context" in parallel else train
    run = Run(corpus, out, (f"parallel={{{parallel}}}", LORA, *more))
    pool.run(world, kind, run, TIMEOUT_SECONDS)
    require_equal_runs(corpus / out, corpus / "deepspeed")
    mine, theirs = (adapters(corpus / name) for name in (out, "deepspeed"))
    assert mine.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert float((mine[name] - weight).norm()) <= 1e-4 * float(weight.norm()), name


@pytest.mark.slow
@pytest.mark.parametrize("run", ["tensor2-pipeline2-distributed_optimizertrue", "deepspeed"])
def test_peft_loads_a_runs_adapters_onto_the_base_student(pool: Pool, corpus: Path, run: str):
    if not (corpus / run).is_dir():
        world, parallel, more = CUTS[4]
        more = (f"parallel={{{parallel}}}", LORA, *more)
        pool.run(world, train, Run(corpus, run, more), TIMEOUT_SECONDS)
    base = load_student(corpus / "student").model
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    merged: Any = PeftModel.from_pretrained(base, corpus / run / "adapter").merge_and_unload()
    after, changed = merged.state_dict(), set()
    for name, weight in load_student(corpus / run / "model").model.state_dict().items():
        assert torch.allclose(after[name], weight, rtol=1e-6, atol=1e-7), name
        if not torch.equal(before[name], weight):
            changed.add(name.split(".")[-2])
    assert changed == set(ALL)


def adapters(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Case(tp=2, sp=True), Case(pp=2)], ids=str)
def test_frozen_weights_have_no_buffer_of_gradients(pool: Pool, corpus: Path, layout: Case):
    pool.run(layout.world, check_frozen, Reading(corpus, layout))


@pytest.mark.slow
def test_a_resumed_run_equals_one_that_never_stopped_and_goes_on_under_another_layout(
    pool: Pool, corpus: Path
):
    lora = LORA.replace("}", ", dropout: 0.1}")
    cut = "parallel={tensor: 2, sequence: true, recompute: full, distributed_optimizer: true}"
    common = (cut, "run.save_every=3")
    pool.run(2, train, Run(corpus, "whole", (*common, lora)), TIMEOUT_SECONDS)
    pool.run(2, train, Run(corpus, "resumed", (*common, lora), stop_after=4), TIMEOUT_SECONDS)
    pool.run(2, train, Run(corpus, "resumed", (*common, lora, "run.resume=true")), TIMEOUT_SECONDS)
    whole, resumed = (
        [{k: v for k, v in row.items() if k not in TIMES} for row in rows(corpus / name)]
        for name in ("whole", "resumed")
    )
    assert resumed == whole
    for found in (weights, adapters):
        mine, theirs = found(corpus / "resumed"), found(corpus / "whole")
        assert all(torch.equal(mine[name], weight) for name, weight in theirs.items())
    pool.run(2, train, Run(corpus, "cut", (*common, LORA), stop_after=4), TIMEOUT_SECONDS)
    others = "parallel={pipeline: 2, distributed_optimizer: true}"
    more = (others, LORA, "run.save_every=3", "run.resume=true")
    pool.run(2, train, Run(corpus, "cut", more), TIMEOUT_SECONDS)
    require_equal_runs(corpus / "cut", corpus / "deepspeed")
