"""Teachers that would be cut wrongly are refused by name."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config

from regate_ds.families.text_decoders import decoders_that
from regate_ds.teacher.sharding.tensor_parallel import cut_teacher, require_cuttable
from regate_ds.teacher.sharding.zero3 import partitioned_teacher, require_partitionable
from tests.support.models import text_config

WHERE = {"dtype": torch.float32, "device": "cpu"}


@pytest.mark.parametrize("kind", decoders_that("shards"))
def test_known_families_may_be_cut_down_to_one_key_value_head(kind):
    require_cuttable(text_config(kind, heads=(6, 3), hidden_size=36), 3)


@pytest.mark.parametrize("kind", ["internlm2", "gpt2", "mixtral", "phi3"])
def test_other_families_are_refused_by_name(kind):
    config = SimpleNamespace(model_type=kind, num_key_value_heads=8)
    with pytest.raises(ValueError, match=f"a {kind} model is not known to be cut right; these"):
        require_cuttable(config, 2)


def test_a_rank_without_a_key_value_head_is_refused():
    with pytest.raises(ValueError, match="teacher.tensor=4: the teacher has 2 key-value heads"):
        require_cuttable(text_config("llama"), 4)


@pytest.mark.parametrize(
    "build",
    [lambda config: cut_teacher(config, None, **WHERE), partial(partitioned_teacher, **WHERE)],
)
def test_a_quantized_teacher_is_not_sharded(build):
    config = text_config("llama", quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match="a quantized llama model cannot be sharded"):
        build(config)


@pytest.mark.parametrize("kind", decoders_that("shards"))
def test_known_families_may_be_partitioned(kind):
    config = text_config(kind)
    require_partitionable(config, partial(AutoModelForCausalLM.from_config, config))


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=1),
        GemmaConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, intermediate_size=8),
    ],
    ids=["gpt2", "gemma"],
)
def test_models_of_other_parts_are_not_partitioned(config):
    with pytest.raises(ValueError, match=f"a {config.model_type} model is not built like Llama"):
        require_partitionable(config, partial(AutoModelForCausalLM.from_config, config))
