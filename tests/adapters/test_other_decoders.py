"""A decoder that no test has compared is refused by name, also one of another build."""

from __future__ import annotations

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from regate_ds.adapters.deepspeed.pipeline_student import pipeline_student
from regate_ds.adapters.huggingface.gates import attach_model
from regate_ds.config import RegateConfig


@pytest.mark.parametrize(
    "attach",
    [attach_model, lambda model: pipeline_student(model, RegateConfig(), num_stages=2)],
    ids=["loop", "pipeline"],
)
def test_gpt2_is_refused_by_name_and_left_as_it_is(attach):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    with pytest.raises(ValueError, match="decoder 'gpt2' is not supported; docs/models.md lists"):
        attach(model)
    assert all("forward" not in vars(module) for module in model.modules())
