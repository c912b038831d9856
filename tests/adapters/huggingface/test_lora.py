"""Adapters of peft on gated layers, against the per-layer oracle in fp64 with the same adapters."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from regate_ds import Keyed, Loop, attach
from tests.adapters.huggingface.gated_cases_helper import assert_exact, text_case
from tests.adapters.huggingface.test_oracle_images import embed_llava, llava_case
from tests.adapters.torch.runs_helper import Items, collate, reference
from tests.house.test_docs import blocks
from tests.support.measure import gradients
from tests.support.models import causal_lm, llava
from tests.support.paths import ROOT
from tests.support.planning import config_of, gate_layers

ATTENTION = ["q_proj", "v_proj"]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_lora(model: nn.Module, targets: list[str] | str, **knobs) -> nn.Module:
    """Both factors at random: peft starts with one at 0, which would hide the other's gradient."""
    torch.manual_seed(5)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=targets, **knobs))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return wrapped.train()


@pytest.mark.parametrize("targets", [ATTENTION, ALL_LINEAR])
@pytest.mark.parametrize("gated", [range(0, 3), range(1, 3), range(1, 2)])
def test_adapters_get_exact_gradients_and_the_rest_none(targets: list[str], gated: range):
    model = with_lora(causal_lm(), targets)
    assert_exact(model, text_case([[20], [13]]), gated)


@pytest.mark.parametrize("kind", ["qwen2", "mistral"])
def test_adapters_are_exact_with_packed_rows(kind: str):
    assert_exact(with_lora(causal_lm(kind), ALL_LINEAR), text_case([[9, 11], [13]]), range(1, 3))


def test_adapters_on_the_decoder_of_llava_are_exact():
    model = with_lora(llava(), rf".*language_model.*({'|'.join(ALL_LINEAR)})")
    case = llava_case([[20], [13]], [1, 1])
    assert_exact(model, case, range(1, 3), embed=embed_llava)


def test_a_projector_trained_beside_the_adapters_is_exact():
    model = with_lora(
        llava(),
        rf".*language_model.*({'|'.join(ATTENTION)})",
        modules_to_save=["multi_modal_projector"],
    )
    case = llava_case([[20], [13]], [1, 1])
    assert_exact(model, case, range(1, 3), embed=embed_llava)


@pytest.mark.parametrize(
    "knobs",
    [
        {"use_dora": True},
        {"use_rslora": True, "lora_bias": True},
        {"modules_to_save": ["embed_tokens", "norm"]},
        {"trainable_token_indices": {"embed_tokens": [3, 5, 7]}},
    ],
    ids=lambda knobs: " ".join(knobs),
)
@pytest.mark.parametrize("rows", [[[20], [13]], [[9, 11], [13]]])
def test_other_adapters_and_weights_trained_beside_them_are_exact(knobs: dict, rows: list):
    assert_exact(with_lora(causal_lm(), ALL_LINEAR, **knobs), text_case(rows), range(1, 3))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_bit_of_the_adapters_gradients(use_reentrant: bool):
    results = []
    for checkpointing in (False, True):
        model = with_lora(causal_lm(), ALL_LINEAR)
        gate_layers(model)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        text_case([[20], [13]]).run(model).loss_sum.backward()
        results.append(gradients(model))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize(
    "knobs", [{"targets": ["lm_head"]}, {"targets": ATTENTION, "modules_to_save": ["lm_head"]}]
)
def test_adapters_on_the_head_are_refused(knobs: dict):
    model = with_lora(causal_lm(), **knobs)
    with pytest.raises(ValueError, match="leave lm_head out of quantisation, and of LoRA"):
        gate_layers(model)


def test_the_page_on_peft_runs_as_it_stands():
    (block,) = (block for block, _ in blocks(ROOT / "docs" / "peft.md"))
    names = {
        **{"get_peft_model": get_peft_model, "LoraConfig": LoraConfig, "attach": attach},
        **{"torch": torch, "model": causal_lm(), "T": 100, "reference": reference()},
        "config": config_of(warmup=0, final_dense_share=0.0),
    }
    exec(block, names)
    regate, model, loader = names["regate"], names["model"], Keyed(Items(2), "mine")
    batches = [regate.collate(collate)([loader[n]]) for n in range(2)]
    (window,) = regate.windows(batches, Loop(accumulation=2))
    for batch in window:
        regate.loss(model(**batch)).backward()
    names["optimizer"].step()
    regate.step(applied=True)
    assert not regate.metrics()["dense"]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
