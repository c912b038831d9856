"""The attached model's outputs: dense steps, losses, auxiliary losses, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regate_ds.adapters.huggingface.gates import ElidedOutput, attach_model
from regate_ds.algorithm.scores.entropy import Entropy
from regate_ds.config import RegateConfig
from tests.adapters.huggingface.gated_cases_helper import LOSS_TOLERANCE, Case, text_case
from tests.adapters.huggingface.test_oracle_images import llava_case
from tests.support.measure import assert_gradients_equal, gradients
from tests.support.models import causal_lm, llava
from tests.support.planning import gate_layers

PACKED = [[9, 11], [13, 4, 3]]


def attached(**knobs) -> nn.Module:
    model = causal_lm()
    gate_layers(model, **knobs)
    return model


def record(module: nn.Module, seen: list) -> None:
    module.register_forward_hook(lambda m, args, output: seen.append(output))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [[[20], [13]], PACKED])
@pytest.mark.parametrize("last", [None, 2])
def test_a_dense_step_is_the_host_bit_for_bit_up_to_the_head(attention: str, rows, last):
    model, case = causal_lm("llama", attention), text_case(rows).dense
    host = copy.deepcopy(model)
    gate_layers(model, first_layer=1, last_layer=last)
    ours, theirs = [], []
    record(model.model.norm, ours)
    record(host.model.norm, theirs)
    found = case.run(model).loss_sum
    # With a cache transformers 5.23 does not look for packed samples in position_ids.
    logits = host(input_ids=case.input_ids, use_cache=False, **case.inputs).logits
    labels = case.batch.labels_BT
    wanted = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert torch.equal(*ours, *theirs)
    assert abs(found.item() - wanted.item()) <= LOSS_TOLERANCE * wanted.item()
    found.backward()
    wanted.backward()
    assert_gradients_equal(gradients(model), gradients(host), 1e-6)


def test_a_dense_step_of_llava_is_the_host_bit_for_bit_up_to_the_head():
    model, case = llava(), llava_case([[20], [13]], [1, 1]).dense
    host = copy.deepcopy(model)
    gate_layers(model, first_layer=1)
    ours, theirs = [], []
    record(model.model.language_model.norm, ours)
    record(host.model.language_model.norm, theirs)
    case.run(model)
    host(input_ids=case.input_ids, **case.inputs)
    assert torch.equal(*ours, *theirs)


def test_losses_are_those_of_the_kept_targets_in_reading_order():
    model, case = attached(first_layer=1), text_case(PACKED)
    output = case.run(model)
    assert output.losses.shape == (case.plan.num_targets,)
    assert torch.equal(output.losses.sum(), output.loss_sum)
    single = text_case(PACKED).dense
    by_position = dict(zip(single.plan.label_position_L.tolist(), single.run(model).losses))
    dense = torch.stack([by_position[p] for p in case.plan.label_position_L.tolist()])
    # Not equal, as kept tokens see less; but the same targets, so close to the dense losses.
    assert torch.corrcoef(torch.stack([output.losses, dense]))[0, 1] > 0.5


def test_kept_tokens_do_not_see_the_elided_ones_in_gated_layers():
    model, case = attached(first_layer=0), text_case([[30]])
    changed = case.input_ids.clone()
    real = set(case.plan.position_R.tolist())
    elided = [t for t in range(30) if t not in real]
    changed[0, elided] = 1 + (changed[0, elided] + 7) % 58
    other = Case(changed, case.batch, case.plan)
    assert torch.equal(case.run(model).losses, other.run(model).losses)


def test_own_losses_weighted_by_one_give_the_summed_losss_gradients():
    case, summed, own = text_case([[20], [13]]), attached(), attached(own_loss=True)
    case.run(summed).loss_sum.backward()
    losses = case.run(own).losses
    assert losses.requires_grad
    losses.sum().backward()
    assert_gradients_equal(gradients(own), gradients(summed), 1e-6)


@pytest.mark.parametrize("own_loss", [False, True])
@pytest.mark.parametrize("dense", [True, False])
def test_entropies_are_those_of_the_hosts_logits(own_loss: bool, dense: bool):
    model, case = causal_lm(), text_case(PACKED)
    case = case.dense if dense else case
    host = copy.deepcopy(model)
    attach_model(model, RegateConfig(score=Entropy(), first_layer=2), own_loss=own_loss)
    seen: list[torch.Tensor] = []
    model.model.norm.register_forward_hook(lambda m, args, output: seen.append(output))
    found = case.run(model).entropy
    rows_L = case.plan.label_position_L if dense else case.plan.label_slot_L
    logits = host.lm_head(seen[0].flatten(0, 1)[rows_L])
    wanted = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    assert not found.requires_grad
    assert torch.allclose(found, wanted, rtol=1e-5)


def test_no_entropy_is_computed_for_a_score_that_does_not_ask():
    assert text_case([[20]]).run(attached()).entropy is None


def test_without_own_loss_the_losses_carry_no_gradient():
    assert not text_case([[20]]).run(attached()).losses.requires_grad


def test_an_auxiliary_loss_of_the_base_model_comes_out_as_it_is():
    model, case = causal_lm(), text_case([[20], [9]])
    host_forward = model.model.forward

    def forward(*args, **kwargs):
        outputs = host_forward(*args, **kwargs)
        outputs.aux_loss = outputs.last_hidden_state.mean()
        return outputs

    model.model.forward = forward
    gate_layers(model)
    with_aux, without = case.run(model), case.run(attached())
    assert with_aux.aux_loss.requires_grad
    assert torch.equal(with_aux.loss_sum, without.loss_sum)
    assert without.aux_loss is None


def test_a_micro_batch_without_targets_has_a_loss_of_zero_and_gradients_of_zero():
    for own_loss in (False, True):
        model, case = attached(own_loss=own_loss), text_case([[2], [2]])
        assert case.plan.num_targets == 0
        output = case.run(model)
        output.loss_sum.backward()
        assert output.loss_sum.item() == 0.0
        assert all(not p.grad.any() for p in model.parameters())


def test_evaluation_runs_dense_without_a_plan():
    model, host = attached().eval(), causal_lm().eval()
    case = text_case([[20], [9]])
    with torch.no_grad():
        found = model(input_ids=case.input_ids).logits
        assert torch.equal(found, host(input_ids=case.input_ids).logits)


def test_a_plan_in_evaluation_mode_needs_no_gradient():
    model, case = attached(), text_case([[20], [9]])
    wanted = case.run(model).loss_sum
    with torch.no_grad():
        output = case.run(model.eval())
    assert isinstance(output, ElidedOutput)
    assert torch.equal(output.loss_sum, wanted)


def test_labels_or_positional_inputs_beside_a_plan_are_refused():
    model, case = attached(), text_case([[9]])
    with pytest.raises(ValueError, match="give inputs by keyword and no labels"):
        model(input_ids=case.input_ids, labels=case.input_ids, regate_plan=case.plan)
    with pytest.raises(ValueError, match="give inputs by keyword and no labels"):
        model(case.input_ids, regate_plan=case.plan)


@pytest.mark.parametrize(("first", "last"), [(1, 4), (3, None)])
def test_a_range_that_does_not_fit_the_decoder_is_refused(first: int, last: int | None):
    with pytest.raises(ValueError, match=r"gated layers .* do not fit a decoder of 3 layers"):
        gate_layers(causal_lm(), first_layer=first, last_layer=last)


def test_a_class_over_another_decoder_is_refused_by_name():
    model = causal_lm()
    model.config.model_type = "gemma3_text"
    with pytest.raises(ValueError, match="LlamaForCausalLM is not supported; docs/models.md lists"):
        gate_layers(model)


def test_an_attention_that_cannot_be_bounded_is_refused_by_name():
    model = causal_lm()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation='flex_attention' is not supported"):
        gate_layers(model)


def test_layers_of_an_unknown_type_are_refused_by_name():
    model = causal_lm("qwen2")
    model.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"layers of type \['chunked_attention'\]"):
        gate_layers(model)


def test_a_refused_model_is_left_as_it_was():
    model = causal_lm()
    with pytest.raises(ValueError, match="do not fit"):
        gate_layers(model, first_layer=7)
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("length", [16, 17, 20])
def test_rows_that_reach_the_window_of_a_kernel_are_refused_where_tokens_are_elided(length: int):
    model = causal_lm("mistral", sliding_window=16)
    gate_layers(model)
    # The kernel itself is not needed: refused before it is called.
    model.config._attn_implementation = "flash_attention_2"
    case = text_case([[length], [9]])
    message = f"a row of {length} tokens reaches the attention window of 16"
    with pytest.raises(ValueError, match=message):
        case.run(model)
    model.config._attn_implementation = "sdpa"
    case.run(model)


def test_a_window_that_no_layer_uses_is_no_obstacle():
    model = causal_lm("qwen2")
    model.config.sliding_window = 16
    model.config.layer_types = ["full_attention"] * 3
    gate_layers(model)
    text_case([[20], [9]]).run(model)


def test_what_older_hosts_give_their_layers_and_none_reads_changes_nothing():
    """Older transformers (seen: 5.0) tells layers where a cache would be, and where images are."""
    model, case = causal_lm(), text_case([[20], [13]])
    older = copy.deepcopy(model)
    length = case.input_ids.shape[1]
    more = {"cache_position": torch.arange(length), "mm_token_type_ids": case.input_ids * 0}
    for layer in older.model.layers:
        layer.register_forward_pre_hook(
            lambda m, args, kw: (args, {**kw, **more}), with_kwargs=True
        )
    for each in (model, older):
        gate_layers(each)
        case.run(each).loss_sum.backward()
    found, wanted = gradients(older), gradients(model)
    assert all(torch.equal(found[name], grad) for name, grad in wanted.items())
