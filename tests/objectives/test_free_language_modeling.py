"""Free language modelling against a plain computation, and what a query may know."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from regate_ds.objectives.free_language_modeling import FreeLanguageModeling
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

PICTURES = replace(INPUTS, patch_size=5)


def waves(place: int, width: int) -> Tensor:
    rates = [10_000.0 ** (-n / (width // 2)) for n in range(width // 2)]
    values = [math.sin(place * r) for r in rates] + [math.cos(place * r) for r in rates]
    return torch.tensor(values, dtype=torch.float64)


def norm(layer: Any, x: Tensor) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return x * layer.weight + layer.bias


def linear(layer: Any, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / 2**0.5))


def query_state(queries: Any, place: int, read_MH: Tensor) -> Tensor:
    """One position's state from exactly the places that it may read, head by head."""
    width = read_MH.shape[1]
    state = linear(queries.start, waves(place, width))
    for layer in queries.layers:
        query = linear(layer.query, norm(layer.norm, state))
        keys, values = linear(layer.key_value, norm(layer.norm_read, read_MH)).chunk(2, dim=1)
        size, heads = width // layer.num_heads, []
        for head in range(layer.num_heads):
            own = slice(head * size, (head + 1) * size)
            scores = (keys[:, own] @ query[own] / size**0.5).exp()
            heads.append((scores[:, None] * values[:, own]).sum(0) / scores.sum())
        state = state + linear(layer.out, torch.cat(heads))
        x = gelu(linear(layer.mlp[1], norm(layer.mlp[0], state)))
        state = state + linear(layer.mlp[3], x)
    return norm(queries.norm, state)


def turned(body: Any, before: Tensor, text: Tensor) -> Tensor:
    """The right-to-left states, in the order of the text: tokens are read last first, and each is
    told its own number."""
    num, num_before = len(text), len(before)
    numbers = [*range(num_before), *(num_before + n for n in reversed(range(num)))]
    states = body(
        inputs_embeds=torch.cat([before, text.flip(0)])[None],
        position_ids=torch.tensor([numbers]),
        attention_mask=torch.ones(1, num_before + num, dtype=torch.long),
    ).last_hidden_state[0]
    return torch.cat([states[:num_before], states[num_before:].flip(0)])


def oracle(objective: FreeLanguageModeling, module: Any, rows: Any) -> Tensor:
    draw = objective.draw(rows, INPUTS, seed=7, step=2)
    table, queries = module.main.embedding.weight, module.queries
    kinds, width = queries.kinds.weight, module.main.width
    parts: dict[str, list[Tensor]] = {"right": [], "left": [], "spans": []}
    for n, ids in enumerate(rows.ids_BT.tolist()):
        row = ids[: int(rows.is_real_BT[n].sum())]
        before = torch.zeros(0, width, dtype=torch.float64)
        if rows.patches_BPF is not None:
            before = linear(module.main.patches, rows.patches_BPF[n].double())
        num = len(before)
        right = read(module.main.body, inputs=torch.cat([before, table[row]]))
        left = turned(module.main.body, before, table[row])
        for t, token in enumerate(row):
            from_left = right[num + t - 1] if num + t else None
            from_right = left[num + t + 1] if t + 1 < len(row) else (left[num - 1] if num else None)
            for name, state in (("right", from_left), ("left", from_right)):
                if state is not None:
                    scores = token_scores(module.head, table, state)
                    parts[name].append(-log_share(scores, token))
            first, last = int(draw.first_BT[n, t]), int(draw.last_BT[n, t])
            assert first <= t <= last < len(row)
            known = [kinds[0], *(right[p] + kinds[1] for p in range(num))]
            for u in range(len(row)):
                place = linear(queries.place, waves(u, width))
                if u < first:
                    known.append(right[num + u] + place + kinds[2])
                if u > last:
                    known.append(left[num + u] + place + kinds[3])
            state = query_state(queries, t, torch.stack(known))
            parts["spans"].append(-log_share(token_scores(module.head, table, state), token))
    return sum(sum(losses) / len(losses) for losses in parts.values()) / 3


@pytest.mark.parametrize("has_pictures", [False, True])
def test_loss_and_gradients_are_those_of_a_plain_computation(has_pictures: bool):
    objective = FreeLanguageModeling(longest_span=4, query_heads=3)
    patches = torch.randn(3, 2, 5, dtype=torch.float64) if has_pictures else None
    rows = make_rows(patches=patches)
    module = make_module(objective, PICTURES if has_pictures else INPUTS)
    found, own = loss_and_gradients(objective, module, rows)
    wanted, plain = backward_of(oracle(objective, module, rows), module)
    assert float(found) == pytest.approx(float(wanted), rel=1e-12)
    assert_gradients_equal(own, plain, 1e-10)
    assert all(gradient.norm() > 0 for gradient in own.values() if gradient.dim() > 1)


def test_a_query_knows_everything_but_its_span_and_padding():
    objective = FreeLanguageModeling(longest_span=4, query_heads=3)
    rows, module = make_rows((7, 9)), make_module(objective)
    draw = objective.draw(rows, INPUTS, seed=1, step=0)
    embedded: list[Tensor] = []

    def keep(_: Any, __: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = module.main.embedding.register_forward_hook(keep)
    streams = module.streams(rows)
    states = module.queries(streams, draw.first_BT, draw.last_BT)
    hook.remove()
    (both,) = embedded
    for t in range(7):
        (gradient,) = torch.autograd.grad(states[0, t].square().sum(), both, retain_graph=True)
        # Row 0 of the second half is row 0 turned around: its 7 tokens, then padding.
        by_token = gradient[0, :7].norm(dim=1) + gradient[2, :7].flip(0).norm(dim=1)
        first, last = int(draw.first_BT[0, t]), int(draw.last_BT[0, t])
        known = [u for u in range(7) if by_token[u] > 0]
        assert known == [u for u in range(7) if not first <= u <= last]
        assert gradient[[0, 2], 7:].norm() == 0
        assert gradient[[1, 3]].norm() == 0


def test_spans_hold_their_token_and_have_every_length():
    rows = make_rows((3000,))
    draw = FreeLanguageModeling(longest_span=3).draw(rows, INPUTS, seed=0, step=0)
    place_T = torch.arange(3000)
    before, behind = place_T - draw.first_BT[0], draw.last_BT[0] - place_T
    assert before.min() >= 0
    assert behind.min() >= 0
    inner = (before + behind)[5:-5]
    shares = (inner + 1).bincount(minlength=4)[1:] / len(inner)
    assert (shares - 1 / 3).abs().max() < 0.04
    assert draw.counts == {"left_to_right": 2999, "right_to_left": 2999, "spans": 3000}


@pytest.mark.parametrize("knob", ["longest_span", "query_layers", "query_heads"])
def test_impossible_knobs_are_refused(knob: str):
    with pytest.raises(ValueError, match=f"{knob}=0: must be at least 1"):
        FreeLanguageModeling(**{knob: 0})


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="query_heads=5: the main model's width 12 must be"):
        make_module(FreeLanguageModeling(query_heads=5))
