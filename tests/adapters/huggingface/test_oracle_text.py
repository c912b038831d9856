"""Gated text decoders against the per-layer oracle in fp64."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import nn

from tests.adapters.huggingface.gated_cases_helper import assert_exact, text_case
from tests.support.models import causal_lm

NUM_LAYERS = 4
RANGES = list(itertools.combinations(range(NUM_LAYERS + 1), 2))


@pytest.mark.parametrize(("first", "last"), RANGES)
def test_every_gated_range_is_exact(first: int, last: int):
    model = causal_lm("llama", num_layers=NUM_LAYERS)
    assert_exact(model, text_case([[19], [12, 6]]), range(first, last))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [[[20], [9]], [[9, 11], [13, 4, 3]]])
def test_every_decoder_and_attention_is_exact_with_ragged_and_with_packed_rows(
    kind: str, attention: str, rows: list[list[int]]
):
    assert_exact(causal_lm(kind, attention), text_case(rows), range(1, 3))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [[[20], [9]], [[9, 11], [13, 4, 3]]])
@pytest.mark.parametrize("types", [None, ["full_attention", "sliding_attention", "full_attention"]])
def test_a_window_counts_positions_and_not_kept_tokens(
    attention: str, rows: list[list[int]], types: list[str] | None
):
    if types is None:
        model = causal_lm("mistral", attention, sliding_window=6)
    else:
        sliding = {"use_sliding_window": True, "sliding_window": 6, "layer_types": types}
        model = causal_lm("qwen2", attention, **sliding)
    assert_exact(model, text_case(rows), range(1, 3))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_grouped_queries_are_exact(heads: tuple[int, int]):
    assert_exact(causal_lm("llama", heads=heads), text_case([[17], [8]]), range(0, 3))


@pytest.mark.parametrize("align", ["predictor", "target", "both"])
@pytest.mark.parametrize("keep_share", [0.01, 0.25, 1.0])
def test_every_choice_of_kept_positions_is_exact(align: str, keep_share: float):
    case = text_case([[22], [7, 9]], align=align, keep_share=keep_share)
    assert_exact(causal_lm("qwen2"), case, range(1, 3))


@pytest.mark.parametrize("rows", [[[20], [7]], [[9, 11], [5]]])
def test_rows_filled_and_padded_to_a_multiple_are_exact(rows: list[list[int]]):
    case = text_case(rows, token_multiple=16)
    assert case.plan.num_padded
    assert_exact(causal_lm("llama"), case, range(1, 3))


def test_a_sample_that_keeps_a_single_label_position_is_exact():
    case = text_case([[6]], keep_share=0.01)
    assert case.plan.num_targets == 1
    assert_exact(causal_lm("llama"), case, range(0, 3))


def test_a_single_row_of_one_sample_is_exact():
    assert_exact(causal_lm("llama"), text_case([[30]]), range(0, 3))


def test_a_head_tied_to_the_embedding_gets_the_gradients_of_both():
    model = causal_lm("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_exact(model, text_case([[20], [9]]), range(1, 3))


def test_a_head_with_a_bias_is_exact():
    model = causal_lm("llama")
    model.lm_head.bias = nn.Parameter(torch.randn(model.lm_head.out_features))
    assert_exact(model, text_case([[20], [9]]), range(1, 3))


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes_are_exact(seed: int):
    rng = random.Random(seed)
    num_layers = rng.randrange(1, 5)
    first = rng.randrange(num_layers)
    last = rng.randrange(first + 1, num_layers + 1)
    model = causal_lm(
        rng.choice(["llama", "qwen2", "mistral"]),
        rng.choice(["sdpa", "eager"]),
        num_layers=num_layers,
        heads=rng.choice([(4, 4), (4, 2), (2, 1), (8, 2)]),
    )
    rows = [
        [rng.randrange(3, 16) for _ in range(rng.randrange(1, 4))]
        for _ in range(rng.randrange(1, 4))
    ]
    case = text_case(
        rows,
        seed=seed,
        align=rng.choice(["predictor", "target", "both"]),
        keep_share=rng.choice([0.1, 0.3, 0.5, 0.8]),
        token_multiple=rng.choice([1, 1, 8]),
    )
    assert_exact(model, case, range(first, last))
