"""Only kept rows have a gradient in gated layers: against autograd on the dense model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regate_ds.algorithm.executions.backward_only import BackwardOnly
from regate_ds.algorithm.executions.none import NoElision
from regate_ds.algorithm.plan import with_all_labels
from regate_ds.config import RegateConfig
from regate_ds.recipe.step_figures import gated_share
from tests.adapters.huggingface.gated_cases_helper import (
    TWO_MICRO_BATCHES,
    Case,
    assert_same_bits,
    run_together,
    text_case,
)
from tests.adapters.huggingface.test_lora import ALL_LINEAR, with_lora
from tests.families.zoo.backward_oracle import backward_oracle_loss
from tests.families.zoo.cases import cases_of
from tests.families.zoo.compare import (
    attached_run,
    backward,
    gradient_error,
    loss_error,
    oracle_run,
)
from tests.families.zoo.fp64 import in_fp64
from tests.families.zoo.models.family import attentions_of, build
from tests.families.zoo.models.table import FAMILIES
from tests.support.measure import assert_gradients_equal, gradients
from tests.support.models import causal_lm
from tests.support.planning import attach_model, gate_layers

TOLERANCE = 1e-10


def of_all_labels(case: Case) -> Case:
    return replace(case, plan=with_all_labels(case.plan, case.batch))


CASES = [of_all_labels(case) for case in TWO_MICRO_BATCHES]
ONE_SAMPLE = of_all_labels(text_case([[15]], image_share=0.5))


def attached(model: nn.Module | None = None, **knobs: Any) -> nn.Module:
    model = causal_lm(num_layers=4) if model is None else model
    gate_layers(model, execution=BackwardOnly(), **knobs)
    return model


@pytest.mark.parametrize("name", ["llama", "llava over llama", "qwen2_vl", "gemma2", "qwen3_moe"])
def test_every_gradient_is_that_of_the_dense_model_with_the_others_detached(name: str):
    with in_fp64():
        host = build(FAMILIES[name], attentions_of(FAMILIES[name])[0])
        for case in cases_of(FAMILIES[name], host):
            for planned, plan in case.plans():
                gated = range(4) if planned == "answers" else range(1, 3)
                check_exact(host, case, with_all_labels(plan, case.batch), gated)


def check_exact(host: nn.Module, case: Any, plan: Any, gated: range) -> None:
    attachment = gate_layers(
        host, first_layer=gated.start, last_layer=gated.stop, execution=BackwardOnly()
    )
    found = attached_run(host, case.inputs, plan)
    attachment.remove()
    wanted = oracle_run(host, case.inputs, plan, gated, "backward_only")
    assert loss_error(found, wanted) <= TOLERANCE
    assert gradient_error(found, wanted)[0] <= TOLERANCE
    dense = oracle_run(host, case.inputs, replace(plan, moves_rows=False), gated)
    assert loss_error(found, dense) <= TOLERANCE
    if plan.num_kept < int((case.batch.segment_BT >= 0).sum()):
        assert gradient_error(found, dense)[0] > 1e-2


def test_layers_behind_the_gated_ones_learn_from_every_label():
    model, dense = attached(last_layer=3), attached(first_layer=3)
    found, wanted = run_together(model, CASES), run_together(dense, [c.dense for c in CASES])
    behind = [name for name in wanted if ".3." in name or "lm_head" in name or "model.norm" in name]
    assert len(behind) == 11
    for name in wanted:
        is_same = torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-5)
        assert is_same == (name in behind), name


def test_a_dense_step_changes_no_bit():
    found, wanted = attached(), causal_lm(num_layers=4)
    attach_model(wanted, RegateConfig(execution=NoElision()))
    cases = [case.dense for case in CASES]
    assert_same_bits(run_together(found, cases), run_together(wanted, cases))


def oracle_gradients(model: nn.Module, case: Case) -> dict[str, Tensor]:
    """By the model's own precision, with layers 1 to 3 gated."""
    inputs = {"input_ids": case.input_ids, **case.inputs}
    host = model.get_base_model() if hasattr(model, "get_base_model") else model
    return backward(model, backward_oracle_loss(host, inputs, case.plan, range(1, 4))).gradients


def test_adapters_have_the_gradients_of_the_dense_model_with_the_others_detached():
    torch.set_default_dtype(torch.float64)
    try:
        found, plain = (with_lora(causal_lm(num_layers=4), ALL_LINEAR) for _ in range(2))
        attached(found)
        for case in (*CASES, ONE_SAMPLE):
            wanted = oracle_gradients(plain, case)
            found.zero_grad()
            assert_gradients_equal(run_together(found, [case]), wanted, TOLERANCE)
            assert len(wanted) == 2 * 7 * 4
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_weights_that_autocast_remembers_keep_their_gradients():
    model, plain = attached(), causal_lm(num_layers=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = CASES[0].run(model).loss_sum
    loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = oracle_gradients(plain, CASES[0])
    # bfloat16 has 8 bits, and sums are of other rows.
    assert_gradients_equal(gradients(model), wanted, 0.05)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_bit_with_two_micro_batches_in_flight(use_reentrant: bool):
    found, plain, lengths = attached(), attached(), []
    found.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found.model.layers[2].mlp.register_forward_pre_hook(
        lambda module, args: lengths.append(tuple(args[0].shape[:2]))
    )
    assert_same_bits(run_together(found, CASES), run_together(plain, CASES))
    first, second = (tuple(case.plan.kept_BK.shape) for case in CASES)
    others = [(1, case.input_ids.numel() - case.plan.num_kept) for case in CASES]
    # The run of the others is not run again.
    assert lengths == [others[0], first, others[1], second, second, first]


def saved_bytes(model: nn.Module, case: Case) -> int:
    """What the forward pass leaves behind for the backward pass, each storage counted once."""
    found: dict[int, int] = {}
    kept: list[Tensor] = []

    def save(x: Tensor) -> Tensor:
        kept.append(x)
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        loss = case.run(model).loss_sum
    del loss
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for where, size in found.items() if where not in weights)


def test_rows_without_gradient_are_not_saved():
    model = attached(causal_lm(num_layers=4, intermediate_size=256), first_layer=0)
    case = of_all_labels(text_case([[160]], keep_share=0.01))
    share = case.plan.num_kept / 160
    assert share < 0.5
    # Keys and values of all rows are saved, the mask of kept rows, and what the head reads.
    assert saved_bytes(model, case) < (share + 0.25) * saved_bytes(model, case.dense)


def test_removing_leaves_the_model_as_it_was():
    model, case = causal_lm(num_layers=4), CASES[0]
    wanted = [vars(module).keys() for module in model.modules()]
    attachment = gate_layers(model, execution=BackwardOnly())
    case.run(model)
    attachment.remove()
    assert [vars(module).keys() for module in model.modules()] == wanted
    assert not any(module._forward_hooks for module in model.modules())


def test_what_takes_no_mask_of_kept_rows_is_refused_and_left_alone():
    model = causal_lm()
    model.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2 does not take; load the model with"):
        attached(model)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_5_text", "gemma4_text, shared keys"])
def test_decoders_that_cache_something_else_are_refused_by_name_and_left_alone(name: str):
    with in_fp64():
        host = build(FAMILIES[name])
    kind = host.config.get_text_config(decoder=True).model_type
    with pytest.raises(ValueError, match=f"decoder '{kind}' does not hand its cache the keys"):
        attached(host)
    assert not any("forward" in vars(module) for module in host.modules())


def test_every_position_counts_as_processed():
    assert gated_share(causal_lm(), RegateConfig(execution=BackwardOnly())) == 0.0
