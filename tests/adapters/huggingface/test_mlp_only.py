"""The MLP branch alone is gated: against the host's own forward, and where layers run again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DogeForCausalLM

from regate_ds.adapters.huggingface.mlp import mlp_share
from regate_ds.algorithm.executions.elide import Elide
from regate_ds.algorithm.executions.mlp_only import MlpOnly
from regate_ds.algorithm.executions.none import NoElision
from regate_ds.config import RegateConfig
from regate_ds.recipe.step_figures import gated_share
from tests.adapters.huggingface.gated_cases_helper import (
    TWO_MICRO_BATCHES,
    assert_same_bits,
    run_together,
)
from tests.families.zoo.cases import cases_of
from tests.families.zoo.compare import attached_run, gradient_error, loss_error, oracle_run
from tests.families.zoo.fp64 import in_fp64
from tests.families.zoo.models.family import attentions_of, build
from tests.families.zoo.models.table import FAMILIES
from tests.support.measure import assert_gradients_equal
from tests.support.models import causal_lm
from tests.support.planning import attach_model, gate_layers

TOLERANCE = 1e-10


def attached(model: nn.Module | None = None, **knobs: Any) -> nn.Module:
    model = causal_lm(num_layers=4) if model is None else model
    gate_layers(model, execution=MlpOnly(), **knobs)
    return model


@pytest.mark.parametrize(
    "name", ["llama", "qwen3_5_text", "gemma2", "olmo2", "qwen3_moe", "cohere"]
)
def test_each_kind_of_branch_is_exact(name: str):
    with in_fp64():
        host = build(FAMILIES[name], attentions_of(FAMILIES[name])[0])
        for case in cases_of(FAMILIES[name], host):
            if name == "qwen3_5_text" and case.name == "packed":
                continue  # its samples would see each other
            for plan, gated in (
                (case.plan("answers"), range(4)),
                (case.plan("all kept"), range(1, 3)),
            ):
                check_exact(host, case, plan, gated)


def check_exact(host: nn.Module, case: Any, plan: Any, gated: range) -> None:
    attachment = gate_layers(
        host, first_layer=gated.start, last_layer=gated.stop, execution=MlpOnly()
    )
    found = attached_run(host, case.inputs, plan)
    attachment.remove()
    wanted = oracle_run(host, case.inputs, plan, gated, "mlp_only")
    assert loss_error(found, wanted) <= TOLERANCE
    assert gradient_error(found, wanted)[0] <= TOLERANCE
    if plan.num_kept < case.batch.segment_BT.numel() and gated == range(4):
        other = oracle_run(host, case.inputs, plan, gated, "elide")
        assert loss_error(found, other) > 1e-4


def test_image_rows_skip_the_mlp_too():
    with in_fp64():
        host = build(FAMILIES["llava over llama"])
        case = cases_of(FAMILIES["llava over llama"], host)[0]
        check_exact(host, case, case.plan("answers and images"), range(1, 3))


def test_a_dense_step_changes_no_bit():
    found, wanted = attached(), causal_lm(num_layers=4)
    attach_model(wanted, RegateConfig(execution=NoElision()))
    cases = [case.dense for case in TWO_MICRO_BATCHES]
    assert_same_bits(run_together(found, cases), run_together(wanted, cases))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_bit_with_two_micro_batches_in_flight(use_reentrant: bool):
    found, plain, lengths = attached(), attached(), []
    found.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found.model.layers[2].mlp.register_forward_pre_hook(
        lambda module, args: lengths.append(tuple(args[0].shape[:2]))
    )
    assert_same_bits(run_together(found, TWO_MICRO_BATCHES), run_together(plain, TWO_MICRO_BATCHES))
    first, second = ((1, case.plan.num_kept) for case in TWO_MICRO_BATCHES)
    assert lengths == [first, second, second, first]


def test_a_layer_that_fails_leaves_no_plan_behind():
    model, case = attached(), TWO_MICRO_BATCHES[0]
    fails = model.model.layers[2].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        case.run(model)
    fails.remove()
    plain = causal_lm(num_layers=4)
    assert torch.equal(model(case.input_ids).logits, plain(case.input_ids).logits)


def test_the_branch_adds_exactly_0_to_elided_rows():
    model, case, added = attached(), TWO_MICRO_BATCHES[1], []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, y_BTH: added.append(y_BTH))
    case.run(model)
    kept_P = torch.zeros(case.input_ids.numel(), dtype=torch.bool)
    kept_P[case.plan.position_R] = True
    for y_BTH in added[1:]:
        assert torch.equal(y_BTH.flatten(0, 1).ne(0).any(dim=1), kept_P)
    assert added[0].ne(0).any(dim=-1).all()


def test_rows_are_padded_to_a_multiple_without_an_effect():
    case, lengths = TWO_MICRO_BATCHES[0], []
    config = RegateConfig(execution=MlpOnly(), token_multiple=32)
    found, plain = causal_lm(num_layers=4), attached()
    attach_model(found, config)
    found.model.layers[1].mlp.register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    wanted = run_together(plain, [case])
    assert_gradients_equal(run_together(found, [case]), wanted, 1e-6)
    assert lengths == [32] != [case.plan.num_kept]


@pytest.mark.slow
def test_a_compiled_layer_that_is_checkpointed_agrees():
    torch._dynamo.reset()
    model, plain = (attached(causal_lm(num_layers=2)) for _ in range(2))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.model.layers[1].compile(backend="eager", dynamic=True, fullgraph=True)
    for case in TWO_MICRO_BATCHES:
        model.zero_grad()
        plain.zero_grad()
        found, wanted = run_together(model, [case]), run_together(plain, [case])
        assert_gradients_equal(found, wanted, 1e-6)


def test_a_copy_follows_its_own_plans_and_removing_leaves_the_model_as_it_was():
    model, case = causal_lm(num_layers=4), TWO_MICRO_BATCHES[0]
    attachment = gate_layers(model, execution=MlpOnly())
    wanted = case.run(model).loss_sum
    copied = copy.deepcopy(model)
    attachment.remove()
    assert torch.equal(case.run(copied).loss_sum, wanted)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def with_post_norm() -> nn.Module:
    model = causal_lm()
    model.model.layers[1].post_mlp_norm = nn.LayerNorm(32)
    return model


def without_norm() -> nn.Module:
    model = causal_lm()
    del model.model.layers[1].post_attention_layernorm
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_post_norm, "'llama': a LlamaDecoderLayer has a module 'post_mlp_norm' whose place"),
        (without_norm, "'llama': a LlamaDecoderLayer lacks a module 'post_attention_layernorm'"),
    ],
)
def test_a_layer_whose_branch_is_not_known_is_refused_and_left_alone(make: Any, message: str):
    model = make()
    with pytest.raises(ValueError, match=message):
        attached(model)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("execution", [Elide(), MlpOnly()])
def test_experts_that_other_rows_choose_are_refused(execution: Any):
    config = FAMILIES["doge"].config()
    config.is_moe = True
    with pytest.raises(ValueError, match="is_moe=True: Doge's experts are chosen for a token by"):
        gate_layers(DogeForCausalLM(config), execution=execution)


def test_a_gated_layer_counts_by_the_share_of_its_mlp():
    model = causal_lm(num_layers=4)
    # Hidden 32, half of the heads for keys and values, inner 48.
    mlp, mixer = 3 * 32 * 48, 3 * 32 * 32
    assert mlp_share(model.model.layers[0], "llama") == mlp / (mlp + mixer)
    config = RegateConfig(execution=MlpOnly(), last_layer=3)
    assert gated_share(model, config) == pytest.approx(0.5 * mlp / (mlp + mixer))
    assert gated_share(model, RegateConfig()) == 0.75
    assert gated_share(model, RegateConfig(enabled=False)) == 0.0
    experts = build(FAMILIES["qwen3_moe"])
    with pytest.raises(ValueError, match="decoder 'qwen3_moe' has experts, so that the share"):
        gated_share(experts, RegateConfig(execution=MlpOnly()))
