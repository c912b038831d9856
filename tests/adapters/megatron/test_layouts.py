"""Elided steps under Megatron-core's layouts equal a plain model in one process, per layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("megatron.core", reason="pip install 'regate-ds[megatron]'")

from regate_ds.algorithm.plan import StepPlan
from tests.adapters.megatron.cases_helper import Case
from tests.adapters.megatron.checks_helper import check, plans_of
from tests.adapters.megatron.pool_helper import Pool

CASES = [
    Case(first_layer=0, rows=3, image_share=0.3),
    Case(row_format="ragged", packed=True, recompute="selective", image_share=0.5),
    Case(row_format="ragged", packed=True, first_layer=0, token_multiple=3, image_share=0.1),
    Case(model="tied", token_multiple=4, image_share=0.5),
    Case(model="moe", aux=0.5, first_layer=0, rows=3),
    Case(model="llava", first_layer=0),
    Case(model="llava", pp=2, recompute="full", image_share=0.5),
    Case(model="llava", tp=2, pp=2, row_format="ragged", first_layer=0, image_share=0.5),
    Case(tp=2, dp=2, first_layer=2),
    Case(tp=2, sp=True, one_slice=True, rows=1, image_share=0.3),
    Case(tp=2, sp=True, row_format="ragged", first_layer=0),
    Case(pp=2, last_layer=2, recompute="full"),
    Case(tp=2, sp=True, last_layer=3, recompute="full", one_slice=True, image_share=0.5),
    Case(pp=2, row_format="ragged", packed=True, recompute="full"),
    Case(pp=2, model="tied", dense=True),
    Case(pp=2, vpp=2, recompute="full", num_micro=6),
    Case(pp=2, vpp=2, row_format="ragged", first_layer=0, image_share=0.5),
    Case(cp=2, dp=2, one_slice=True, image_share=0.5),
    Case(dp=2, model="moe", ep=2, recompute="full", aux=0.5, one_slice=True, image_share=0.5),
    Case(tp=2, pp=2, sp=True, row_format="ragged"),
    Case(tp=2, cp=2, sp=True, recompute="selective", image_share=0.3),
    Case(pp=4, first_layer=2),
    Case(pp=4, last_layer=3, row_format="ragged", recompute="full", num_micro=6),
    Case(pp=2, cp=2, last_layer=3, first_layer=0, row_format="ragged", image_share=0.5),
    Case(dp=2, pp=2, num_micro=3, image_share=0.5),
    Case(cp=2, row_format="ragged", packed=True, recompute="full"),
    Case(cp=2, row_format="ragged", packed=True, positions="yarn", last_layer=3, first_layer=0),
]
"""Each pair of tensor, context, pipeline and data parallelism stands together somewhere."""

POSITIONS = [
    Case(positions="yarn", rows=3, image_share=0.5),
    Case(positions="yarn", tp=2, sp=True, row_format="ragged"),
    Case(positions="mrope", rows=3, first_layer=0, image_share=0.5, recompute="full"),
    Case(positions="mrope", row_format="ragged", packed=True, image_share=0.5),
    Case(positions="mrope", pp=2, vpp=2, recompute="selective"),
    Case(positions="mrope", tp=2, cp=2, sp=True, image_share=0.3),
    Case(positions="mrope", pp=2, cp=2, row_format="ragged", last_layer=3),
    Case(positions="mrope", model="around", pp=2, image_share=0.5),
    Case(positions="mrope", model="around", tp=2, sp=True, first_layer=0, image_share=0.5),
    Case(positions="yarn", cp=2, row_format="ragged", image_share=0.5),
]
"""Other positions than one axis of plain frequencies."""

LATENT_CASES = [
    Case(model="latent", rows=3, image_share=0.5),
    Case(model="latent", positions="yarn", first_layer=0, recompute="full"),
    Case(model="latent", positions="yarn", row_format="ragged", last_layer=3),
    Case(model="latent", pp=2, cp=2, recompute="selective"),
    Case(model="latent", tp=2, sp=True, recompute="full", image_share=0.5),
]
"""Attention with a rotary table of its own."""

METHODS = [
    Case(execution="loss_only", row_format="ragged", packed=True),
    Case(pp=2, execution="loss_only", last_layer=3),
    Case(cp=2, execution="loss_only"),
    Case(tp=2, sp=True, execution="elide_images", image_share=0.5),
    Case(pp=2, cp=2, execution="elide_images", image_share=0.5, row_format="ragged"),
    Case(pp=2, quota="per_window", row_format="ragged"),
    Case(dp=2, quota="per_window"),
    Case(score="random", first_layer=0, rows=3),
    Case(tp=2, sp=True, score="random"),
    Case(tp=2, cp=2, sp=True, score="entropy"),
    Case(tp=2, pp=2, score="entropy", row_format="ragged"),
]
"""Other methods than the paper's."""

WEIGHTED = [
    replace(case, execution="weighted", score="reference", keep_share=1.0)
    for case in (Case(tp=2, sp=True), Case(pp=2, row_format="ragged"), Case(cp=2, rows=3))
]
"""Every label has a loss, with a weight."""

MERGED = [
    Case(merged=3, rows=3, image_share=0.5),
    Case(merged=2, model="llava", first_layer=2),
    Case(merged=4, dp=2, ep=2, model="moe", aux=0.5, recompute="full", first_layer=0),
    Case(merged=3, tp=2, execution="loss_only", rows=1, length=9),
    Case(merged=3, model="latent", positions="yarn", score="entropy"),
    Case(merged=3, pp=2, vpp=2, score="entropy"),
    Case(merged=4, pp=2, last_layer=3, recompute="full", token_multiple=3),
    Case(merged=3, tp=2, cp=2, sp=True, recompute="selective"),
    Case(merged=5, dp=2, pp=2, num_micro=3, model="tied"),
]
"""A merged step, and then one of the paper's method."""


ALL = CASES + POSITIONS + LATENT_CASES + METHODS + WEIGHTED + MERGED
ALL.sort(key=lambda case: case.world)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_step_equals_the_plain_model(pool: Pool, case: Case):
    pool.run(case.world, check, case)


@pytest.mark.parametrize("case", METHODS, ids=str)
def test_another_method_chooses_otherwise_than_the_papers(case: Case):
    paper = replace(case, execution="elide", quota="per_sample", score="fused")
    mine, papers = (plans_of(one)[1] for one in (case, paper))
    assert 0 < mine.num_targets_global < mine.counts["answer_total"]
    assert chosen(mine) != chosen(papers)


@pytest.mark.parametrize("case", WEIGHTED, ids=str)
def test_weights_of_a_step_differ_and_add_up_to_the_targets(case: Case):
    plan = plans_of(case)[1]
    weight_L = torch.cat([one.weight_L for one in plan.micro if one.weight_L is not None])
    assert plan.num_targets_global == plan.counts["answer_total"] == len(weight_L)
    assert float(weight_L.sum()) == pytest.approx(len(weight_L))
    assert float(weight_L.std()) > 0.1


def chosen(plan: StepPlan) -> list[tuple[list[int], list[int]]]:
    """The positions that each micro-batch keeps, and those with a loss."""
    return [(one.position_R.tolist(), one.label_position_L.tolist()) for one in plan.micro]
