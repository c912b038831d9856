"""LoRA students, auxiliary losses, and a single kept token."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import peft
import torch

from regate_ds.adapters.huggingface import attach_model
from regate_ds.training.checkpoint import full_weights, merge_lora
from tests.models import causal_lm
from tests.oracle import assert_gradients_equal, gradients
from tests.unit.adapters.test_huggingface import oracle_loss, planned


def with_lora():
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    model = peft.get_peft_model(causal_lm(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.train()


def test_lora_gradients_equal_the_oracles():
    model = with_lora()
    exact = copy.deepcopy(model).double()
    ids, batch, plan = planned([[20], [13]])
    attach_model(model, first_layer=1)
    found = model(input_ids=ids, regate_plan=plan).loss_sum
    found.backward()
    host = exact.get_base_model()
    wanted = oracle_loss(host, host.get_input_embeddings()(ids), batch, plan, range(1, 3))
    wanted.backward()
    assert abs(found.item() - wanted.item()) <= 1e-6 * abs(wanted.item())
    assert all("lora_" in name for name in gradients(model))
    assert_gradients_equal(gradients(model), gradients(exact), 5e-6)


def test_merged_adapters_give_the_adapted_models_logits():
    model = with_lora().eval()
    ids = torch.tensor([[3, 5, 7, 9]])
    wanted = model(input_ids=ids).logits
    first = SimpleNamespace(is_first=True)
    weights = merge_lora(full_weights(model, first), model.peft_config["default"])
    bare = causal_lm().eval()
    bare.load_state_dict(weights)
    assert torch.allclose(bare(input_ids=ids).logits, wanted, atol=1e-5)


def test_an_auxiliary_loss_of_the_base_model_comes_out_once_and_unscaled():
    model = causal_lm()
    ids, _, plan = planned([[20], [13]])
    attach_model(model)
    extra = torch.tensor(0.25, requires_grad=True)
    model.model.register_forward_hook(lambda m, i, out: setattr(out, "aux_loss", extra))
    assert model(input_ids=ids, regate_plan=plan).aux_loss is extra


def test_a_sample_may_keep_a_single_label_position():
    model = causal_lm()
    exact = copy.deepcopy(model).double()
    ids, batch, plan = planned([[6]], keep_share=0.01)
    assert plan.num_targets == 1
    attach_model(model, first_layer=0)
    found = model(input_ids=ids, regate_plan=plan).loss_sum
    found.backward()
    wanted = oracle_loss(exact, exact.get_input_embeddings()(ids), batch, plan, range(0, 3))
    wanted.backward()
    assert_gradients_equal(gradients(model), gradients(exact), 5e-6)
