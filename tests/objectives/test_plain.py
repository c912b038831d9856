"""Plain masked and causal language modelling against a plain computation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from regate_ds.objectives.contract import weighted_loss
from regate_ds.objectives.plain import Causal, Masked
from tests.objectives.small_helper import (
    INPUTS,
    backward_of,
    log_share,
    loss_and_gradients,
    make_module,
    make_rows,
    read,
    token_scores,
)
from tests.support.measure import assert_gradients_equal


def patches_of(module: Any, rows: Any, n: int):
    """What is read before a row's text, [P, E]."""
    if rows.patches_BPF is None:
        return torch.zeros(0, module.main.width, dtype=torch.float64)
    linear = module.main.patches
    return rows.patches_BPF[n] @ linear.weight.T + linear.bias


def masked_oracle(objective: Masked, module: Any, rows: Any):
    draw = objective.draw(rows, INPUTS, seed=7, step=2)
    losses, kinds = [], set()
    for n, ids in enumerate(rows.ids_BT.tolist()):
        row = ids[: int(rows.is_real_BT[n].sum())]
        seen, picked = list(row), []
        for t in range(len(row)):
            number = float(draw.mask_draw_BT[n, t])
            if number == 2.0:
                continue
            picked.append(t)
            third = objective.mask_share + (1 - objective.mask_share) / 2
            kind = "mask" if number < objective.mask_share else "any" if number < third else "own"
            kinds.add(kind)
            if kind != "own":
                any_token = int(float(draw.sample_draw_BTU[n, t, 0]) * INPUTS.num_tokens)
                seen[t] = INPUTS.mask_id if kind == "mask" else any_token
        table = module.main.embedding.weight
        before = patches_of(module, rows, n)
        states = read(module.main.body, inputs=torch.cat([before, table[seen]]))[len(before) :]
        losses += [-log_share(token_scores(module.head, table, states[t]), row[t]) for t in picked]
    assert kinds == {"mask", "any", "own"}
    return sum(losses) / len(losses)


def causal_oracle(module: Any, rows: Any):
    table, losses = module.main.embedding.weight, []
    for n, ids in enumerate(rows.ids_BT.tolist()):
        row = ids[: int(rows.is_real_BT[n].sum())]
        before = patches_of(module, rows, n)
        for t in range(0 if len(before) else 1, len(row)):
            # Later tokens are not even there.
            states = read(module.main.body, inputs=torch.cat([before, table[row[:t]]]))
            losses.append(-log_share(token_scores(module.head, table, states[-1]), row[t]))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("has_pictures", [False, True])
@pytest.mark.parametrize("objective", [Masked(pick_share=0.9, mask_share=0.4), Causal()])
def test_loss_and_gradients_are_those_of_a_plain_computation(objective: Any, has_pictures: bool):
    torch.manual_seed(1)
    patches = torch.randn(3, 2, 5, dtype=torch.float64) if has_pictures else None
    rows = make_rows(patches=patches)
    module = make_module(objective, replace(INPUTS, patch_size=5) if has_pictures else INPUTS)
    found, own = loss_and_gradients(objective, module, rows)
    if isinstance(objective, Masked):
        wanted = masked_oracle(objective, module, rows)
    else:
        wanted = causal_oracle(module, rows)
    wanted, plain = backward_of(wanted, module)
    assert float(found) == pytest.approx(float(wanted), rel=1e-12)
    assert_gradients_equal(own, plain, 1e-10)


def test_a_term_without_a_position_has_no_part_in_the_loss():
    losses = {"one": torch.tensor(6.0), "none": torch.tensor(0.0)}
    loss = weighted_loss(losses, {"one": 3, "none": 0}, {"one": 2.0, "none": 1.0})
    assert float(loss) == 4.0


@pytest.mark.parametrize("knob", ["pick_share", "mask_share"])
def test_impossible_knobs_are_refused(knob: str):
    with pytest.raises(ValueError, match=f"{knob}=0.0: must be above 0 and at most 1"):
        Masked(**{knob: 0.0})
