"""Attaching and taking off again leave the host's own model."""

from __future__ import annotations

import copy
import inspect
from types import MethodType

import pytest
import torch
from torch import nn

from regate_ds.adapters.attachment import Attachment
from regate_ds.adapters.huggingface.wishes import Wishes
from tests.adapters.huggingface.gated_cases_helper import text_case
from tests.adapters.huggingface.test_lora import ALL_LINEAR, with_lora
from tests.support.models import causal_lm, llava, qwen2_vl
from tests.support.planning import gate_layers

MODELS = {
    "llama": causal_lm,
    "llava": llava,
    "qwen2_vl": qwen2_vl,
    "lora": lambda: with_lora(causal_lm(), ALL_LINEAR),
}
PROMPT = torch.tensor([[3, 5, 7, 9]])


def own_attributes(model: nn.Module) -> dict[str, dict[str, object]]:
    """Identities of everything that an instance holds itself, module by module."""
    return {
        name: {key: id(value) for key, value in vars(module).items() if key[0] != "_"}
        for name, module in model.named_modules()
    }


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    return MODELS[request.param]()


def attach(model: nn.Module) -> Attachment:
    return gate_layers(model, run_tower_without_image=True)


def test_removing_leaves_no_trace(model: nn.Module):
    before, classes = own_attributes(model), [type(m) for m in model.modules()]
    attachment = attach(model)
    assert own_attributes(model) != before
    attachment.remove()
    assert own_attributes(model) == before
    assert [type(m) for m in model.modules()] == classes


def test_no_parameter_changes_its_name_and_nothing_is_saved_with_the_weights(model: nn.Module):
    weights = {name: id(p) for name, p in model.named_parameters()}
    state = list(model.state_dict())
    attach(model)
    assert {name: id(p) for name, p in model.named_parameters()} == weights
    assert list(model.state_dict()) == state


def test_without_a_plan_an_attached_model_is_the_host_bit_for_bit(model: nn.Module):
    before = model(input_ids=PROMPT, labels=PROMPT)
    attachment = attach(model)
    during = model(input_ids=PROMPT, labels=PROMPT)
    attachment.remove()
    after = model(input_ids=PROMPT, labels=PROMPT)
    for found in (during, after):
        assert torch.equal(found.logits, before.logits)
        assert torch.equal(found.loss, before.loss)


def test_generation_after_attaching_is_the_hosts_own(model: nn.Module):
    model.eval()
    before = model.generate(input_ids=PROMPT, max_new_tokens=6, do_sample=False)
    attach(model)
    assert torch.equal(model.generate(input_ids=PROMPT, max_new_tokens=6, do_sample=False), before)


def test_the_signature_that_hosts_look_at_stays(model: nn.Module):
    host = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = inspect.signature(host.forward)
    attach(model)
    assert inspect.signature(host.forward) == before


def test_attaching_twice_is_refused_and_changes_nothing(model: nn.Module):
    attach(model)
    before = own_attributes(model)
    with pytest.raises(RuntimeError, match="forward is already replaced on this model; remove"):
        attach(model)
    assert own_attributes(model) == before


def test_a_failed_attachment_takes_off_what_it_had_put_on():
    model = causal_lm()
    last = model.model.layers[-1]
    last.forward = last.forward
    with pytest.raises(RuntimeError, match="LlamaDecoderLayer.forward is already replaced"):
        attach(model)
    assert [m for m in model.modules() if "forward" in vars(m)] == [last]


def test_a_forward_that_the_host_has_put_there_is_displaced_and_put_back():
    model, case = causal_lm(), text_case([[20], [9]])
    asked = []

    def of_the_host(self: nn.Module, *args: object, **kwargs: object) -> object:
        asked.append(kwargs)
        return type(self).forward(self, *args, **kwargs)

    model.forward = own = MethodType(of_the_host, model)
    attachment = gate_layers(model, wishes=Wishes(may_displace=lambda forward: forward is own))
    case.run(model)
    assert not asked
    model(input_ids=PROMPT)
    assert len(asked) == 1
    attachment.remove()
    assert vars(model)["forward"] is own


def test_another_forward_than_the_hosts_is_not_displaced():
    model = causal_lm()
    model.forward = MethodType(type(model).forward, model)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM.forward is already replaced"):
        gate_layers(model, wishes=Wishes(may_displace=lambda forward: False))


def test_after_removing_it_can_be_attached_again():
    model, case = causal_lm(), text_case([[20], [9]])
    attach(model).remove()
    gate_layers(model, first_layer=2)
    other = causal_lm()
    gate_layers(other, first_layer=2)
    assert torch.equal(case.run(model).loss_sum, case.run(other).loss_sum)


def test_removing_twice_does_nothing_more():
    model = causal_lm()
    attachment = attach(model)
    attachment.remove()
    attachment.remove()
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("own_loss", [False, True])
def test_a_copy_of_an_attached_model_is_independent_of_it(own_loss: bool):
    model, case = causal_lm(), text_case([[20], [13]])
    attachment = gate_layers(model, own_loss=own_loss)
    wanted = case.run(model).loss_sum
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = case.run(copied).loss_sum
    assert torch.equal(found, wanted)
    found.backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in copied.parameters())
    attachment.remove()
    assert torch.equal(case.run(copied).loss_sum, wanted)
