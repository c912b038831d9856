"""What bounds attention among kept tokens, for each implementation."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from regate_ds.adapters.huggingface.attention import attention_inputs
from tests.adapters.huggingface.gated_cases_helper import Case, assert_exact, text_case
from tests.adapters.huggingface.plain_flash_helper import PlainFlash, uses_flash
from tests.support.models import causal_lm
from tests.support.planning import gate_layers

RAGGED, PACKED = [[20], [13]], [[9, 11], [13, 4, 3]]


@pytest.fixture
def flash(monkeypatch) -> PlainFlash:
    stand_in = PlainFlash()
    stand_in.install(monkeypatch)
    return stand_in


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("rows", [RAGGED, PACKED])
@pytest.mark.parametrize("gated", [range(0, 3), range(1, 3), range(1, 2)])
def test_flash_attention_is_exact_with_the_boundaries_that_it_is_given(flash, kind, rows, gated):
    assert_exact(uses_flash(causal_lm(kind)), text_case(rows, token_multiple=4), gated)


def test_flash_attention_gets_the_runs_of_the_plan_in_gated_layers(flash):
    model, case = uses_flash(causal_lm()), text_case(PACKED, token_multiple=32)
    gate_layers(model, first_layer=1)
    case.run(model)
    before, *gated = flash.boundaries
    assert before == [0, 9, 20, 33, 37, 40]
    assert gated == [[0, *accumulate(case.plan.run_lengths)]] * 2
    assert case.plan.num_padded


def test_flash_attention_of_one_sample_a_row_infers_no_boundaries_from_gaps(flash):
    model = uses_flash(causal_lm())
    gate_layers(model, first_layer=0)
    text_case(RAGGED).run(model)
    assert flash.boundaries == [None] * 3


@pytest.mark.parametrize("rows", [RAGGED, PACKED])
def test_boundaries_that_the_user_gives_stay_outside_the_gated_layers(flash, rows):
    model, case = uses_flash(causal_lm()), text_case(rows)
    ends = torch.tensor([0, 20, 40], dtype=torch.int32)
    if case.plan.is_packed:
        ends = torch.tensor([0, 9, 20, 33, 37, 40], dtype=torch.int32)
    longest = int(ends.diff().max())
    given = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    given |= {"max_length_q": longest, "max_length_k": longest}
    assert_exact(model, replace(case, inputs={**case.inputs, **given}), range(1, 3))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [RAGGED, PACKED])
def test_masks_allow_the_same_sample_and_what_is_not_later(attention: str, rows):
    plan = text_case(rows, token_multiple=16).plan
    mask = attention_inputs(plan, causal_lm(attention=attention))["attention_mask"]
    if attention == "sdpa" and not plan.is_packed:
        # Causal, with the padding at the end: nothing that is real sees it.
        assert mask is None
        return
    allowed = mask if mask.dtype == torch.bool else mask == 0
    for r, segments in enumerate(plan.segment_BK.tolist()):
        for query, mine in enumerate(segments):
            for key, other in enumerate(segments):
                assert bool(allowed[r, 0, query, key]) == (mine == other and key <= query)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [RAGGED, PACKED])
def test_padding_slots_never_spoil_a_gradient(attention: str, rows):
    model, case = causal_lm(attention=attention), text_case(rows, token_multiple=32)
    assert case.plan.num_padded
    gate_layers(model)
    case.run(model).loss_sum.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def with_mask(case: Case) -> Case:
    mask = (case.batch.segment_BT >= 0).long()
    return replace(case, inputs={**case.inputs, "attention_mask": mask})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("gated", [range(0, 3), range(1, 3)])
def test_a_mask_of_the_users_for_right_padding_changes_nothing(attention: str, gated: range):
    assert_exact(causal_lm("llama", attention), with_mask(text_case(RAGGED)), gated)


def test_a_mask_of_the_users_stays_outside_flash_attention_in_gated_layers(flash):
    losses = []
    for model, case in (
        (uses_flash(causal_lm()), with_mask(text_case(RAGGED))),
        (causal_lm(), text_case(RAGGED)),
    ):
        gate_layers(model, first_layer=0)
        losses.append(case.run(model).loss_sum.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_flash_attention_of_packed_rows_is_bounded_in_dense_steps_too(flash):
    model, case = uses_flash(causal_lm()), text_case(PACKED).dense
    gate_layers(model)
    with_mask(case).run(model)
    assert flash.boundaries == [[0, 9, 20, 33, 37, 40]] * 3
