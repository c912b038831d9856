"""What is refused at attach time or in a call, each by name."""

from __future__ import annotations

import pytest
import torch
from peft import CPTConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

from tests.adapters.huggingface.gated_cases_helper import text_case
from tests.support.models import causal_lm, llava, text_config
from tests.support.planning import gate_layers

CASE = text_case([[20], [13]])


class ScaledLogits(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 4
        return output


def hooked() -> nn.Module:
    model = causal_lm()
    model.lm_head.register_forward_hook(lambda module, args, out: 30 * torch.tanh(out / 30))
    return model


def tuned(config) -> nn.Module:
    return get_peft_model(causal_lm(), config)


PREFIX = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
PROMPT = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
OTHER_TASK = PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
CONTEXT = CPTConfig(
    task_type="CAUSAL_LM", cpt_token_ids=[3, 5], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 4]
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScaledLogits(text_config()), "ScaledLogits.forward is defined in .*test_support"),
        (hooked, "the output head has forward hooks"),
        (lambda: tuned(PREFIX), "PrefixTuningConfig puts its tokens into a cache, or computes a"),
        (
            lambda: tuned(CONTEXT),
            "CPTConfig puts its tokens into a cache, or computes a loss",
        ),
        (lambda: tuned(OTHER_TASK), "PromptTuningConfig has task_type=FEATURE_EXTRACTION"),
        (lambda: get_peft_model(llava(), PROMPT), "rows with images of a LlavaForConditionalGen"),
        (lambda: LlamaModel(text_config()), "LlamaModel has no language modelling head"),
        (lambda: LlamaForSequenceClassification(text_config()), "has no language modelling head"),
        (lambda: nn.Linear(2, 2), "Linear is not a Hugging Face language model"),
        (lambda: torch.compile(causal_lm()), "OptimizedModule is not a Hugging Face language"),
    ],
)
def test_models_that_would_be_computed_wrongly_are_refused(make, message: str):
    model = make()
    before = [module for module in model.modules() if "forward" in vars(module)]
    with pytest.raises(ValueError, match=message):
        gate_layers(model)
    assert [module for module in model.modules() if "forward" in vars(module)] == before


def test_lora_is_not_taken_for_prompt_learning():
    gate_layers(tuned(LoraConfig(target_modules=["q_proj"])))


@pytest.mark.parametrize("case", [CASE, CASE.dense])
@pytest.mark.parametrize(("cut", "found"), [(0, "2 rows of 28"), (8, "2 rows of 20")])
def test_a_plan_of_other_rows_is_refused(case, cut: int, found: str):
    model = causal_lm()
    gate_layers(model)
    longer = text_case([[28 - cut], [13]]).input_ids
    if cut:
        case = text_case([[24], [13]]) if case.plan.moves_rows else text_case([[24], [13]]).dense
    planned = case.plan.num_tokens
    message = f"the decoder reads {found} tokens, the plan is of 2 rows of {planned}"
    with pytest.raises(ValueError, match=message):
        model(input_ids=longer, regate_plan=case.plan)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"past_key_values": DynamicCache()}, "a plan is of whole samples, without a cache"),
        ({"return_dict": False}, "return_dict=False with a regate_plan"),
        ({"labels": CASE.input_ids}, "give inputs by keyword and no labels"),
    ],
)
def test_calls_that_contradict_a_plan_are_refused(inputs: dict, message: str):
    model = causal_lm()
    gate_layers(model)
    with pytest.raises(ValueError, match=message):
        model(input_ids=CASE.input_ids, regate_plan=CASE.plan, **inputs)
