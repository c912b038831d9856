"""Adapters written into the weights give the adapted model."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import torch

from regate_ds.recipe.saving.model import full_weights, merge_lora
from regate_ds.recipe.students.config import LoraConfig
from tests.support.models import causal_lm


def test_merged_adapters_give_the_adapted_models_logits():
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    model = peft.get_peft_model(causal_lm(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    ids = torch.tensor([[3, 5, 7, 9]])
    wanted = model(input_ids=ids).logits
    lora = LoraConfig(rank=4, alpha=8.0)
    weights = merge_lora(full_weights(model, SimpleNamespace(is_first=True)), lora)
    bare = causal_lm().eval()
    bare.load_state_dict(weights)
    assert torch.allclose(bare(input_ids=ids).logits, wanted, atol=1e-5)
