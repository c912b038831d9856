"""ELECTRA's objective against a plain computation, row by row and position by position."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from regate_ds.objectives.replaced_token import ReplacedToken
from tests.objectives.small_helper import (
    INPUTS,
    backward_of,
    log_share,
    loss_and_gradients,
    make_module,
    make_rows,
    read,
    sampled,
    token_scores,
)
from tests.support.measure import assert_gradients_equal


def guessed_row(module: Any, row: list[int], draws: Tensor, mask_share: float, sample: Tensor):
    """The generator's losses at a row's picked positions, and what the main model reads."""
    table = module.main.embedding.weight
    masked = [INPUTS.mask_id if d < mask_share else t for t, d in zip(row, draws, strict=True)]
    helper = module.helper
    states = read(helper.body, inputs=table[masked] @ helper.enter.weight.T + helper.enter.bias)
    losses, seen = [], list(row)
    for t, token in enumerate(row):
        if draws[t] == 2.0:
            continue
        scores = token_scores(helper.head, table, states[t])
        losses.append(-log_share(scores, token))
        seen[t] = sampled(scores, float(sample[t, 0]), set(INPUTS.special_ids))
    return losses, seen, states


def oracle(objective: ReplacedToken, module: Any, rows: Any) -> Tensor:
    draw = objective.draw(rows, INPUTS, seed=7, step=2)
    guesses, judgements = [], []
    for n, ids in enumerate(rows.ids_BT.tolist()):
        row = ids[: int(rows.is_real_BT[n].sum())]
        draws = draw.mask_draw_BT[n, : len(row)]
        losses, seen, _ = guessed_row(
            module, row, draws, objective.mask_share, draw.sample_draw_BTU[n]
        )
        guesses += losses
        first, _, last = module.judge
        for t, state in enumerate(read(module.main.body, seen)):
            x = first.weight @ state + first.bias
            x = x * 0.5 * (1.0 + torch.erf(x / 2**0.5))
            score = (last.weight @ x + last.bias)[0]
            share = 1.0 / (1.0 + (-score).exp())
            judgements.append(-(share if seen[t] != row[t] else 1.0 - share).log())
    return sum(guesses) / len(guesses) + objective.weight * sum(judgements) / len(judgements)


@pytest.mark.parametrize("knobs", [{}, {"pick_share": 0.6, "mask_share": 0.5, "weight": 3.0}])
def test_loss_and_gradients_are_those_of_a_plain_computation(knobs: dict[str, float]):
    objective = ReplacedToken(**knobs)
    rows, module = make_rows(), make_module(objective)
    found, own = loss_and_gradients(objective, module, rows)
    wanted, plain = backward_of(oracle(objective, module, rows), module)
    assert float(found) == pytest.approx(float(wanted), rel=1e-12)
    assert_gradients_equal(own, plain, 1e-10)
    assert all(gradient.norm() > 0 for gradient in own.values() if gradient.dim() > 1)


def test_no_gradient_passes_from_the_judgement_to_the_generator():
    objective = ReplacedToken(pick_share=0.5)
    rows, module = make_rows(), make_module(objective)
    losses = module(rows, objective.draw(rows, INPUTS, seed=7, step=2))
    losses["replaced"].backward()
    assert all(p.grad is None for p in module.helper.parameters())
    assert module.main.embedding.weight.grad.norm() > 0


def test_shares_of_positions_are_picked_and_masked_and_never_padding_or_special_ones():
    rows = make_rows((2000, 1000))
    draw = ReplacedToken().draw(rows, INPUTS, seed=0, step=0)
    picked_BT = draw.mask_draw_BT < 2.0
    assert picked_BT.sum(dim=1).tolist() == [round(0.15 * 1999), round(0.15 * 999)]
    assert set(rows.ids_BT[picked_BT].tolist()).isdisjoint(INPUTS.special_ids)
    share = float((draw.mask_draw_BT[picked_BT] < 0.85).float().mean())
    assert abs(share - 0.85) < 4 * math.sqrt(0.85 * 0.15 / 450)
    assert draw.counts == {"generator": int(picked_BT.sum()), "replaced": 3000}


def test_a_row_is_asked_the_same_beside_any_other_and_otherwise_in_the_next_step():
    objective, rows = ReplacedToken(pick_share=0.5), make_rows((6, 9))
    draw = objective.draw(rows, INPUTS, seed=1, step=4)
    alone = make_rows((6,))
    own = objective.draw(alone, INPUTS, seed=1, step=4)
    assert torch.equal(draw.mask_draw_BT[0, :6], own.mask_draw_BT[0])
    assert torch.equal(draw.sample_draw_BTU[0, :6], own.sample_draw_BTU[0])
    other = objective.draw(alone, INPUTS, seed=1, step=5)
    assert not torch.equal(own.mask_draw_BT, other.mask_draw_BT)


def test_sampled_tokens_have_the_distribution_of_the_scores():
    from regate_ds.objectives.picking import sample_tokens

    scores = torch.tensor([[0.0, 5.0, 1.0, 2.0, -1.0]], dtype=torch.float64)
    draws = torch.rand(1, 40_000, generator=torch.Generator().manual_seed(0))
    found = sample_tokens(scores, draws, never=(1,))[0].bincount(minlength=5) / 40_000
    wanted = scores[0].masked_fill(torch.tensor([0, 1, 0, 0, 0]).bool(), -torch.inf).softmax(0)
    assert found[1] == 0
    assert (found - wanted).abs().max() < 4 * math.sqrt(0.25 / 40_000)


@pytest.mark.parametrize(
    ("knob", "value", "message"),
    [
        ("pick_share", 0.0, "pick_share=0.0: must be above 0 and at most 1"),
        ("mask_share", 1.5, "mask_share=1.5: must be above 0 and at most 1"),
        ("generator_divisor", 0, "generator_divisor=0: must be at least 1"),
        ("weight", -1.0, "weight=-1.0: must be above 0"),
    ],
)
def test_impossible_knobs_are_refused(knob: str, value: float, message: str):
    with pytest.raises(ValueError, match=message):
        ReplacedToken(**{knob: value})
