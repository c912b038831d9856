"""A weighted loss in a Hugging Face model against the per-sample oracle, gradients too."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from regate_ds.adapters.huggingface.gates import attach_model
from regate_ds.algorithm.executions.weighted import Weighted
from regate_ds.algorithm.scores.reference import ReferenceOnly
from regate_ds.config import RegateConfig
from regate_ds.schedule_config import ScheduleConfig
from regate_ds.session import Regate
from regate_ds.stores.values import Stores
from tests.adapters.huggingface.gated_cases_helper import (
    LOSS_TOLERANCE,
    TOLERANCE,
    Case,
    exact_run,
    text_case,
)
from tests.support.measure import assert_gradients_equal, gradients, relative_error
from tests.support.models import causal_lm
from tests.support.stores import RandomReference, index_of

CONFIG = RegateConfig(
    execution=Weighted(),
    score=ReferenceOnly(),
    keep_share=1.0,
    schedule=ScheduleConfig(warmup=0, final_dense_share=0.0),
)


def weighed(rows: list[list[int]]) -> Case:
    case = text_case(rows)
    stores = Stores(RandomReference(index_of([case.batch])))
    (plan,) = Regate(CONFIG, stores, total_steps=2).plan_step([case.batch]).micro
    inputs = case.inputs if plan.is_packed else {}
    return Case(case.input_ids, case.batch, plan, inputs)


@pytest.mark.parametrize("own_loss", [False, True], ids=["our loss", "own loss"])
@pytest.mark.parametrize("rows", [[[20], [13]], [[8, 9], [25]]], ids=["rows", "packed"])
def test_loss_and_gradients_are_the_oracles(rows: list[list[int]], own_loss: bool):
    model, case = causal_lm(num_layers=3), weighed(rows)
    assert case.plan.weight_L is not None
    assert float(case.plan.weight_L.std()) > 0.1
    wanted_loss, wanted = exact_run(model, case, range(0))
    attached = copy.deepcopy(model)
    attach_model(attached, CONFIG, own_loss=own_loss)
    output = case.run(attached)
    # What is remembered of a position is its own loss, without the weight.
    total = float((output.losses.detach() * case.plan.weight_L).sum())
    assert total == pytest.approx(float(output.loss_sum.detach()), rel=1e-6)
    output.loss_sum.backward()
    assert abs(float(output.loss_sum.detach()) - wanted_loss) <= LOSS_TOLERANCE * wanted_loss
    assert_gradients_equal(gradients(attached), wanted, TOLERANCE)
    _, unweighed = exact_run(model, case.dense, range(0))
    assert relative_error(unweighed, wanted) > 0.05


def test_equal_weights_change_no_bit():
    model, case = causal_lm(num_layers=2), text_case([[20], [13]])
    found, wanted = copy.deepcopy(model), copy.deepcopy(model)
    ones = torch.ones(case.dense.plan.num_targets)
    for one, weight_L in ((found, ones), (wanted, None)):
        attach_model(one, CONFIG)
        plan = replace(case.dense.plan, weight_L=weight_L)
        Case(case.input_ids, case.batch, plan).run(one).loss_sum.backward()
    mine, theirs = gradients(found), gradients(wanted)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
