"""Each gated layer runs on its own set of tokens: against plain loops over the layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regate_ds.algorithm.executions.none import NoElision
from regate_ds.algorithm.executions.random_ltd import RandomLtd
from regate_ds.config import RegateConfig
from tests.adapters.huggingface.gated_cases_helper import (
    TWO_MICRO_BATCHES,
    Case,
    assert_same_bits,
    run_together,
    text_case,
)
from tests.adapters.huggingface.test_lora import ALL_LINEAR, with_lora
from tests.families.zoo.cases import Case as ZooCase
from tests.families.zoo.cases import cases_of
from tests.families.zoo.compare import attached_run, gradient_error, loss_error, oracle_run
from tests.families.zoo.fp64 import in_fp64
from tests.families.zoo.models.family import build
from tests.families.zoo.models.table import FAMILIES
from tests.support.measure import assert_gradients_equal, gradients
from tests.support.models import causal_lm
from tests.support.planning import attach_model, gate_layers

TOLERANCE = 1e-10
GATED = range(1, 4)


def drawn(case: Case, gated: range = GATED) -> Case:
    plan = ZooCase("", {}, case.batch).plan_of("random_ltd", case.plan, gated)
    return replace(case, plan=plan)


CASES = [drawn(case) for case in TWO_MICRO_BATCHES]
ONE_SAMPLE = drawn(text_case([[15]]))


def attached(model: nn.Module | None = None, gated: range = GATED) -> nn.Module:
    model = causal_lm(num_layers=5) if model is None else model
    gate_layers(model, first_layer=gated.start, last_layer=gated.stop, execution=RandomLtd())
    return model


def loop_loss(model: nn.Module, case: Case) -> Tensor:
    """One sample a row, alone: gather, run the host's layer, scatter; the loss on all labels."""
    host = model.get_base_model() if hasattr(model, "get_base_model") else model
    total = torch.zeros(())
    for row, labels_T in enumerate(case.batch.labels_BT):
        length = int((case.batch.segment_BT[row] >= 0).sum())
        x_1TH = host.get_input_embeddings()(case.input_ids[row, None, :length])
        cos, sin = host.model.rotary_emb(x_1TH, torch.arange(length)[None])
        for number, layer in enumerate(host.model.layers):
            kept = list(range(length))
            if number in GATED:
                flat = case.plan.sets[number - GATED.start].position_R.tolist()
                kept = [t - row * case.plan.num_tokens for t in flat]
                kept = [t for t in kept if 0 <= t < length]
            y_1KH = layer(x_1TH[:, kept], position_embeddings=(cos[:, kept], sin[:, kept]))
            rows = list(x_1TH[0])
            for slot, t in enumerate(kept):
                rows[t] = y_1KH[0, slot]
            x_1TH = torch.stack(rows)[None]
        logits_TV = host.lm_head(host.model.norm(x_1TH))[0]
        total = total + nn.functional.cross_entropy(logits_TV, labels_T[:length], reduction="sum")
    return total


@pytest.mark.parametrize("with_adapters", [False, True])
def test_every_gradient_is_that_of_a_loop_that_gathers_and_scatters(with_adapters: bool):
    torch.set_default_dtype(torch.float64)
    try:
        found, plain = (causal_lm(num_layers=5) for _ in range(2))
        if with_adapters:
            found, plain = (with_lora(one, ALL_LINEAR) for one in (found, plain))
        attached(found)
        for case in (CASES[0], ONE_SAMPLE):
            found.zero_grad()
            plain.zero_grad()
            loop_loss(plain, case).backward()
            assert_gradients_equal(run_together(found, [case]), gradients(plain), TOLERANCE)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["llama", "llava over llama", "qwen2_vl"])
def test_images_padded_and_packed_rows_are_exact(name: str):
    with in_fp64():
        host = build(FAMILIES[name])
        for case in cases_of(FAMILIES[name], host):
            for planned, gated in (("answers", range(1, 3)), ("all kept", range(4))):
                plan = case.plan_of("random_ltd", case.plan(planned), gated)
                attachment = gate_layers(
                    host, first_layer=gated.start, last_layer=gated.stop, execution=RandomLtd()
                )
                found = attached_run(host, case.inputs, plan)
                attachment.remove()
                wanted = oracle_run(host, case.inputs, plan, gated, "random_ltd")
                assert loss_error(found, wanted) <= TOLERANCE
                assert gradient_error(found, wanted)[0] <= TOLERANCE


def test_a_dense_step_changes_no_bit():
    found, wanted = attached(), causal_lm(num_layers=5)
    attach_model(wanted, RegateConfig(execution=NoElision()))
    cases = [case.dense for case in CASES]
    assert_same_bits(run_together(found, cases), run_together(wanted, cases))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_bit_with_two_micro_batches_in_flight(use_reentrant: bool):
    found, plain = attached(), attached()
    found.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same_bits(run_together(found, CASES), run_together(plain, CASES))


def test_the_layers_see_sets_of_their_own_and_the_others_every_token():
    model, seen = attached(), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    case: Any = CASES[0]
    case.run(model)
    slots = [one.num_slots for one in case.plan.sets]
    assert seen == [case.plan.num_tokens, *slots, case.plan.num_tokens]
    assert len({tuple(one.position_R.tolist()) for one in case.plan.sets}) == 3


def test_layers_that_read_the_keys_of_others_are_refused():
    with in_fp64():
        host = build(FAMILIES["gemma4_text, shared keys"])
    with pytest.raises(ValueError, match="read keys of earlier ones, which execution=random_ltd"):
        attached(host)
