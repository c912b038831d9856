"""MC-BERT's objective against a plain computation, position by position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regate_ds.objectives.multi_choice import MultiChoice
from tests.objectives.small_helper import (
    INPUTS,
    backward_of,
    layer_then_norm,
    log_share,
    loss_and_gradients,
    make_module,
    make_rows,
    read,
    sampled,
    token_scores,
)
from tests.objectives.test_replaced_token import guessed_row
from tests.support.measure import assert_gradients_equal


def choices(module: Any, state: Tensor, seen: int, truth: int, draws: list[float]) -> list[int]:
    """A position's candidates, each once; where the token was replaced, the truth is the first."""
    scores = token_scores(module.helper.head, module.main.embedding.weight, state)
    never = {*INPUTS.special_ids, seen, truth}
    found = [sampled(scores, draw, never) for draw in draws]
    if seen != truth:
        found[0] = truth
    return list(dict.fromkeys(found))


def oracle(objective: MultiChoice, module: Any, rows: Any) -> Tensor:
    draw = objective.draw(rows, INPUTS, seed=7, step=2)
    table = module.main.embedding.weight
    guesses, chosen, num_replaced = [], [], 0
    for n, ids in enumerate(rows.ids_BT.tolist()):
        row = ids[: int(rows.is_real_BT[n].sum())]
        losses, seen, states = guessed_row(
            module,
            row,
            draw.mask_draw_BT[n, : len(row)],
            objective.mask_share,
            draw.sample_draw_BTU[n, :, :1],
        )
        guesses += losses
        for t, state in enumerate(read(module.main.body, seen)):
            draws = draw.sample_draw_BTU[n, t, 1:].tolist()
            candidates = choices(module, states[t], seen[t], row[t], draws)
            query = layer_then_norm(module.query, state)
            scores = [query @ module.neither, *(query @ table[one] for one in candidates)]
            is_replaced = seen[t] != row[t]
            num_replaced += is_replaced
            right = 1 + candidates.index(row[t]) if is_replaced else 0
            assert right in (0, 1)
            chosen.append(-log_share(torch.stack(scores), right))
    assert 0 < num_replaced < len(chosen)
    return sum(guesses) / len(guesses) + objective.weight * sum(chosen) / len(chosen)


@pytest.mark.parametrize("knobs", [{}, {"pick_share": 0.6, "candidates": 3, "weight": 2.0}])
def test_loss_and_gradients_are_those_of_a_plain_computation(knobs: dict[str, Any]):
    objective = MultiChoice(**knobs)
    rows, module = make_rows(), make_module(objective)
    found, own = loss_and_gradients(objective, module, rows)
    wanted, plain = backward_of(oracle(objective, module, rows), module)
    assert float(found) == pytest.approx(float(wanted), rel=1e-12)
    assert_gradients_equal(own, plain, 1e-10)
    assert all(gradient.norm() > 0 for gradient in own.values() if gradient.dim() > 1)


def test_no_gradient_passes_from_the_choice_to_the_controller():
    objective = MultiChoice(pick_share=0.5)
    rows, module = make_rows(), make_module(objective)
    module(rows, objective.draw(rows, INPUTS, seed=7, step=2))["choice"].backward()
    assert all(p.grad is None for p in module.helper.parameters())


@pytest.mark.parametrize(
    ("knob", "value", "message"),
    [
        ("pick_share", 2.0, "pick_share=2.0: must be above 0 and at most 1"),
        ("mask_share", 0.0, "mask_share=0.0: must be above 0 and at most 1"),
        ("controller_divisor", 0, "controller_divisor=0: must be at least 1"),
        ("candidates", 1, "candidates=1: must be at least 2"),
        ("weight", 0.0, "weight=0.0: must be above 0"),
    ],
)
def test_impossible_knobs_are_refused(knob: str, value: float, message: str):
    with pytest.raises(ValueError, match=message):
        MultiChoice(**{knob: value})
