"""Rows of another vocabulary, against a plain loop, and the ids of special tokens."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, LlavaConfig, PhiConfig, PhiForCausalLM

from regate_ds.recipe.tasks.pretraining.tokenizer import train_tokenizer
from regate_ds.recipe.vocabulary.bpe import train_in_place_of
from regate_ds.recipe.vocabulary.pieces import old_pieces
from regate_ds.recipe.vocabulary.transfer import mean_rows, renumber, transfer
from tests.support.models import causal_lm
from tests.support.tiny_students import make_llava

PIECES = [[3], [0, 1, 1], [5, 2], [4]]


def plain_means(rows_VH: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.stack([rows_VH[old] for old in one]).mean(0) for one in PIECES])


def with_bias() -> nn.Module:
    config = PhiConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
    )
    model = PhiForCausalLM(config)
    nn.init.normal_(model.lm_head.bias)
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: causal_lm(vocab_size=8),
        lambda: causal_lm(vocab_size=8, tie_word_embeddings=True),
        with_bias,
    ],
    ids=["apart", "tied", "bias"],
)
def test_a_new_row_is_the_mean_of_its_old_pieces_rows(make, tmp_path):
    model = make().double()
    before = deepcopy(model)
    transfer(model, PIECES)
    expected = plain_means(before.get_input_embeddings().weight)
    assert torch.allclose(model.get_input_embeddings().weight, expected, rtol=0, atol=1e-15)
    expected = plain_means(before.lm_head.weight)
    assert torch.allclose(model.lm_head.weight, expected, rtol=0, atol=1e-15)
    is_tied = before.lm_head.weight is before.get_input_embeddings().weight
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == is_tied
    if getattr(before.lm_head, "bias", None) is not None:
        expected = plain_means(before.lm_head.bias[:, None])[:, 0]
        assert torch.allclose(model.lm_head.bias, expected, rtol=0, atol=1e-15)
    assert model.config.vocab_size == len(PIECES)
    # A token that keeps its row has the logit that it had.
    ids = torch.tensor([[0, 3]])
    old_ids = torch.tensor([[3, 4]])
    own, old = model(ids).logits[..., [0, 3]], before(old_ids).logits[..., [3, 4]]
    assert torch.allclose(own, old, rtol=0, atol=1e-12)


def test_means_of_low_precision_are_summed_in_high():
    rows_VH = torch.tensor([[256.0], [1.0], [1.0], [1.0], [1.0]]).bfloat16()
    mean = mean_rows(rows_VH, [[0, 1, 2, 3, 4]])
    assert mean.dtype == torch.bfloat16
    assert mean.item() == torch.tensor(52.0).bfloat16()


def test_another_embedding_in_the_decoder_is_named():
    model = causal_lm(vocab_size=8)
    model.model.layers[1].per_layer = nn.Embedding(8, 2)
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM has rows for tokens in layers.1.per_la"
    ):
        transfer(model, PIECES)


def test_ids_of_special_tokens_are_numbered_anew_in_every_config():
    old = train_tokenizer(["red red blue"], vocab_size=300)
    old.add_tokens(["<extra>"], special_tokens=True)
    new = train_in_place_of(old, ["green green grass"], size=280)
    config: LlavaConfig = make_llava().model.config
    config.image_token_id = old.convert_tokens_to_ids("<image>")
    config.text_config.eos_token_id = [old.eos_token_id, old.convert_tokens_to_ids("<extra>")]
    config.text_config.pad_token_id = 10_000
    config.text_config.bos_token_id = None
    renumber(config, old, new)
    assert config.image_token_id == new.convert_tokens_to_ids("<image>")
    extra = new.convert_tokens_to_ids("<extra>")
    assert extra != old.convert_tokens_to_ids("<extra>")
    assert config.text_config.eos_token_id == [new.eos_token_id, extra]
    assert config.text_config.pad_token_id == 10_000
    assert config.text_config.bos_token_id is None
    config.image_token_id = old(" red", add_special_tokens=False).input_ids[0]
    with pytest.raises(
        ValueError, match="image_token_.*=.* is 'Ġred', which the new tokenizer does"
    ):
        renumber(config, old, new)


def test_ids_of_words_that_are_never_generated_are_numbered_anew():
    old = train_tokenizer(["red red blue"], vocab_size=300)
    old.add_tokens(["<extra>"], special_tokens=True)
    new = train_in_place_of(old, ["green green grass"], size=280)
    before, after = (one.convert_tokens_to_ids("<extra>") for one in (old, new))
    assert before != after
    # Idefics3 has such ones of its image tokens.
    config = GenerationConfig(bad_words_ids=[[before], [before, before]], suppress_tokens=[before])
    renumber(config, old, new)
    assert config.bad_words_ids == [[after], [after, after]]
    assert config.suppress_tokens == [after]


def test_a_vocabulary_carried_over_to_itself_changes_nothing():
    student = make_llava()
    before = deepcopy(student.model.state_dict())
    tokenizer = student.tokenizer
    same = old_pieces(tokenizer, tokenizer)
    assert same == [[number] for number in range(len(tokenizer))]
    transfer(student.model, same)
    after = student.model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
