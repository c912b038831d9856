"""Activation checkpointing and torch.compile change where a layer runs, not what it computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.adapters.huggingface.gated_cases_helper import (
    TWO_MICRO_BATCHES,
    assert_same_bits,
    run_together,
    text_case,
)
from tests.support.measure import assert_gradients_equal, gradients
from tests.support.models import causal_lm
from tests.support.planning import gate_layers


def attached(**knobs) -> nn.Module:
    model = causal_lm(num_layers=4)
    gate_layers(model, **knobs)
    return model


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("first", "last"), [(0, None), (1, None), (1, 3), (3, None)])
def test_checkpointing_changes_no_bit_with_two_micro_batches_in_flight(use_reentrant, first, last):
    found = attached(first_layer=first, last_layer=last)
    found.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    plain = attached(first_layer=first, last_layer=last)
    assert_same_bits(run_together(found, TWO_MICRO_BATCHES), run_together(plain, TWO_MICRO_BATCHES))


@pytest.mark.parametrize("own_loss", [False, True])
def test_checkpointing_switched_on_before_attaching_changes_no_bit(own_loss: bool):
    model = causal_lm(num_layers=4)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    gate_layers(model, own_loss=own_loss)
    plain = attached(own_loss=own_loss)
    assert_same_bits(run_together(model, TWO_MICRO_BATCHES), run_together(plain, TWO_MICRO_BATCHES))


def test_layers_do_run_again_in_the_backward_pass():
    model = attached()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    lengths = []
    model.model.layers[2].mlp.register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    run_together(model, TWO_MICRO_BATCHES)
    first, second = (case.plan.num_slots for case in TWO_MICRO_BATCHES)
    assert lengths == [first, second, second, first]


NUM_COMPILED_LAYERS = 10
"""More than torch._dynamo lets one function compile, were layers compiled one by one."""

COMPILED_CASES = [
    text_case([[20], [9]]),
    text_case([[20], [9]]).dense,
    text_case([[31], [12]], seed=2),
    text_case([[17], [33], [11]], seed=3),
    text_case([[17], [33], [11]], seed=3).dense,
    text_case([[24], [24]], keep_share=1.0),
]


@pytest.mark.parametrize(("last", "checkpointing"), [(None, True), (7, False)])
def test_compiled_layers_compile_twice_at_most_and_agree(last: int | None, checkpointing: bool):
    torch._dynamo.reset()
    compiled = []

    def counted(graph, example_inputs):
        # The graph as it is: what is in question is what the compiler's front makes of a layer.
        compiled.append(graph)
        return graph.forward

    model = causal_lm(num_layers=NUM_COMPILED_LAYERS)
    plain = copy.deepcopy(model)
    for each in (model, plain):
        gate_layers(each, first_layer=1, last_layer=last)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:
        layer.compile(backend=counted, dynamic=True, fullgraph=True)
    for case in COMPILED_CASES:
        case.run(model).loss_sum.backward()
        case.run(plain).loss_sum.backward()
    assert_gradients_equal(gradients(model), gradients(plain), 1e-6)
    # Layers of one kind (before the range, first of it, rest of it) share what was compiled.
    assert 2 <= len(compiled) <= 2 * 3
