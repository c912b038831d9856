"""The oracle is the host where nothing is elided, and it tells wrong results from right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.models.auto import modeling_auto

from regate_ds.algorithm.plan import plan_dense
from tests.families.zoo.cases import Case, cases_of
from tests.families.zoo.compare import attached_run, gradient_error, loss_error, oracle_run
from tests.families.zoo.fp64 import in_fp64
from tests.families.zoo.models.family import build
from tests.families.zoo.models.left_out import LEFT_OUT
from tests.families.zoo.models.table import FAMILIES
from tests.families.zoo.oracle import host_loss, kept_positions, oracle_loss
from tests.support.planning import gate_layers

WHOLE = range(4)
VARIED = ("llama", "cohere", "granite", "nanochat", "deepseek_v3", "olmoe", "lfm2", "qwen3_next")
"""Texts with scales, caps, experts, low-rank keys and recurrent layers, and no window."""

FEW = ("llava over llama", "qwen2_vl", "llama")


@pytest.fixture(autouse=True)
def _exact():
    with in_fp64():
        yield


def made(name: str, attention: str = "sdpa") -> tuple[Any, list[Case]]:
    host = build(FAMILIES[name], attention)
    return host, cases_of(FAMILIES[name], host)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FEW)
def test_with_everything_kept_the_oracle_is_the_host(name: str, attention: str):
    host, cases = made(name, attention)
    for case in cases:
        wanted = float(host_loss(host, case.inputs, case.batch))
        for plan in (plan_dense(case.batch), case.plan("all kept")):
            found = float(oracle_loss(host, case.inputs, plan, WHOLE).detach())
            assert abs(found - wanted) <= 1e-12 * wanted, case.name


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIED)
def test_if_all_layers_are_gated_the_oracle_is_the_host_on_the_kept_tokens_alone(name: str):
    host, cases = made(name)
    case = next(one for one in cases if one.name == "text")
    plan = case.plan("answers")
    wanted = float(oracle_loss(host, case.inputs, plan, WHOLE).detach())
    assert abs(short_rows(host, case, plan) - wanted) <= 1e-12 * wanted
    if name in ("lfm2", "qwen3_next"):
        return  # few of their layers know positions
    first = replace(plan, kept_BK=torch.arange(plan.num_slots).expand_as(plan.kept_BK))
    assert abs(short_rows(host, case, plan, first) - wanted) > 1e-4 * wanted


def short_rows(host: Any, case: Case, plan: Any, positions: Any = None) -> float:
    """The host's loss on rows of kept tokens, at their own positions or at those of a plan."""
    inputs = {
        "input_ids": case.inputs["input_ids"].gather(1, plan.kept_BK),
        "position_ids": (positions or plan).kept_BK,
        "attention_mask": (plan.segment_BK >= 0).long(),
    }
    logits_BKV = host(**inputs).logits
    logits_LV = logits_BKV.flatten(0, 1)[plan.label_slot_L]
    return float(torch.nn.functional.cross_entropy(logits_LV, plan.targets_L, reduction="sum"))


@pytest.mark.parametrize("name", FEW)
def test_another_kept_set_or_range_has_another_loss(name: str):
    host, cases = made(name)
    case = cases[0]
    plan = case.plan("answers")
    wanted = float(oracle_loss(host, case.inputs, plan, WHOLE).detach())
    kept_BT = kept_positions(plan)
    spare = kept_BT & ~torch.isin(torch.arange(kept_BT.numel()), plan.label_position_L).view_as(
        kept_BT
    )
    fewer = plan.position_R[plan.position_R != int(spare.view(-1).nonzero()[1])]
    for other, gated in ((replace(plan, position_R=fewer), WHOLE), (plan, range(1, 3))):
        assert abs(float(oracle_loss(host, case.inputs, other, gated)) - wanted) > 1e-4 * wanted


@pytest.mark.parametrize("name", FEW)
def test_an_adapter_that_gates_another_layer_is_caught(name: str):
    host, cases = made(name)
    plan = cases[0].plan("answers")
    attachment = gate_layers(host, first_layer=1, last_layer=3)
    found = attached_run(host, cases[0].inputs, plan)
    attachment.remove()
    right = oracle_run(host, cases[0].inputs, plan, range(1, 3))
    wrong = oracle_run(host, cases[0].inputs, plan, range(2, 3))
    assert loss_error(found, right) < 1e-12
    assert gradient_error(found, right)[0] < 1e-10
    assert loss_error(found, wrong) > 1e-4
    assert gradient_error(found, wrong)[0] > 1e-2


def test_every_class_of_transformers_is_in_the_zoo_or_has_a_reason():
    found = {one.model_class for one in FAMILIES.values()}
    mappings = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    for mapping in mappings:
        missing = {name for name, one in mapping.items() if one not in found}
        assert not missing - LEFT_OUT.keys()
