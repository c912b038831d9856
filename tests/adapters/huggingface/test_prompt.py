"""Rows behind virtual tokens of peft: the plan by hand, the loss and gradients by the oracle."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch
from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from regate_ds.adapters.huggingface.prompt import behind_virtual_tokens
from regate_ds.algorithm.batch import IGNORE, TokenBatch
from regate_ds.algorithm.executions.mlp_only import MlpOnly
from regate_ds.algorithm.plan import ElisionPlan, plan_loss, plan_rows, with_all_labels
from tests.adapters.huggingface.gated_cases_helper import (
    LOSS_TOLERANCE,
    TOLERANCE,
    Case,
    text_case,
)
from tests.support.measure import assert_gradients_equal, gradients
from tests.support.models import causal_lm
from tests.support.oracle import oracle_loss
from tests.support.planning import gate_layers

NUM_VIRTUAL = 3
COMMON = {"task_type": "CAUSAL_LM", "num_virtual_tokens": NUM_VIRTUAL}
METHODS = {
    "prompt tuning": PromptTuningConfig(**COMMON),
    "p-tuning": PromptEncoderConfig(**COMMON, encoder_hidden_size=16),
}
CASES = {
    "uneven rows": text_case([[20], [13]]),
    "padded slots": text_case([[20], [6]], token_multiple=16, image_share=0.5),
    "a dense step": text_case([[20], [13]]).dense,
}


def tuned(name: str) -> nn.Module:
    torch.manual_seed(5)
    return get_peft_model(causal_lm(), METHODS[name]).train()


def shifted(batch: TokenBatch) -> TokenBatch:
    """The batch of rows that begin with virtual tokens."""
    front_BV = torch.zeros(len(batch.labels_BT), NUM_VIRTUAL, dtype=torch.int64)
    return TokenBatch(
        batch.keys,
        torch.cat([front_BV, batch.segment_BT], dim=1),
        torch.cat([front_BV + IGNORE, batch.labels_BT], dim=1),
    )


def plan_by_hand(case: Case) -> ElisionPlan:
    batch, plan = shifted(case.batch), case.plan
    if not plan.moves_rows:
        return plan_loss(batch, batch.is_label_BT)
    front_BV = torch.arange(NUM_VIRTUAL).expand(len(plan.kept_BK), -1)
    beyond = batch.labels_BT.shape[1]
    moved_BK = (plan.kept_BK + NUM_VIRTUAL).masked_fill(plan.segment_BK < 0, beyond)
    return plan_rows(batch, torch.cat([front_BV, moved_BK], dim=1))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("all_labels", [False, True])
def test_the_moved_plan_is_that_of_the_longer_rows(name: str, all_labels: bool):
    case, wanted = CASES[name], plan_by_hand(CASES[name])
    plan = case.plan
    if all_labels:
        plan = with_all_labels(plan, case.batch)
        wanted = with_all_labels(wanted, shifted(case.batch))
    found = behind_virtual_tokens(plan, NUM_VIRTUAL)
    compared = [one.name for one in fields(found) if "run_lengths" not in one.name]
    for field in compared:
        mine, theirs = getattr(found, field), getattr(wanted, field)
        if isinstance(mine, Tensor):
            assert torch.equal(mine, theirs), field
        elif field != "num_filled":
            assert mine == theirs, field


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_the_prompts_gradient_is_the_oracles(method: str, name: str):
    model, case = tuned(method), CASES[name]
    gated = range(1, 3)
    exact = copy.deepcopy(model).double()
    host = exact.get_base_model()
    words_BTH = host.get_input_embeddings()(case.input_ids)
    embedded = torch.cat([exact.get_prompt(batch_size=len(words_BTH)), words_BTH], dim=1)
    wanted = oracle_loss(host, embedded, shifted(case.batch), plan_by_hand(case), gated)
    wanted.backward()

    gate_layers(model, first_layer=gated.start, last_layer=gated.stop)
    output = case.run(model)
    output.loss_sum.backward()
    assert abs(output.loss_sum.item() - wanted.item()) <= LOSS_TOLERANCE * wanted.item()
    assert output.plan is case.plan
    found = gradients(model)
    assert found
    assert_gradients_equal(found, gradients(exact), TOLERANCE)


def test_other_executions_run_on_the_moved_plan_as_on_one_of_longer_rows():
    model, case = tuned("prompt tuning"), text_case([[20], [13]])
    host = copy.deepcopy(model.get_base_model())
    gate_layers(model, execution=MlpOnly())
    gate_layers(host, execution=MlpOnly())
    words_BTH = host.get_input_embeddings()(case.input_ids)
    prompt_BVH = model.get_prompt(batch_size=len(words_BTH))
    embedded = torch.cat([prompt_BVH, words_BTH], dim=1)
    wanted = host(inputs_embeds=embedded, regate_plan=plan_by_hand(case))
    found = case.run(model)
    assert torch.equal(found.losses, wanted.losses)


def test_rows_of_several_samples_are_refused():
    model = tuned("prompt tuning")
    gate_layers(model)
    packed = text_case([[9, 11], [13]])
    with pytest.raises(ValueError, match="a row holds several samples"):
        packed.run(model)
    with pytest.raises(ValueError, match="which only the first would see; give each sample a row"):
        behind_virtual_tokens(packed.plan, NUM_VIRTUAL)
