"""Build main model and helper from the fields of a Hugging Face config, with new weights."""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModel

from regate_ds.objectives.contract import Inputs
from regate_ds.recipe.pretrain.config import PretrainTree

_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
"""Fields by which a helper is narrower; the width of a head stays."""


def build_module(config: PretrainTree, inputs: Inputs, *, longest: int) -> nn.Module:
    """Return the module of the objective, with new weights drawn from the run's seed.

    longest: positions of the longest row, patches included. ValueError for fields that make no
    model, or one that does not suit the objective.
    """
    # The weights must not depend on what the process has drawn before, nor change what follows.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        tokens = {"vocab_size": inputs.num_tokens, "pad_token_id": inputs.pad_id}
        main = _build(config.model, tokens, "model")
        _require_length(main, longest)
        _require_direction(main, config.objective.is_causal)
        return config.objective.build(main, _build_helper(config, main), inputs)


def _build_helper(config: PretrainTree, main: Any) -> nn.Module | None:
    divisor = config.objective.helper_divisor
    if divisor is None:
        return None
    fields = {**config.model}
    for name in _WIDTHS:
        value = getattr(main.config, name, None)
        if value is None or name in config.helper:
            continue
        if value % divisor:
            raise ValueError(
                f"model.{name}={value}: a helper {divisor} times narrower needs a multiple of "
                f"{divisor}; change it, or set helper.{name}"
            )
        fields[name] = value // divisor
    # The helper reads by the main model's embeddings, so its own table is thrown away.
    return _build({**fields, **config.helper}, {"vocab_size": 1, "pad_token_id": 0}, "helper")


def _build(fields: dict[str, Any], tokens: dict[str, int], where: str) -> Any:
    if given := sorted(tokens.keys() & fields.keys()):
        raise ValueError(
            f"{where}.{given[0]}={fields[given[0]]}: is the tokenizer's own; leave it out"
        )
    others = {name: value for name, value in fields.items() if name != "model_type"}
    try:
        settings = AutoConfig.for_model(fields.get("model_type", ""), **others, **tokens)
        # bos and eos of a config are for generation alone, and may lie beyond the table.
        body = AutoModel.from_config(settings, attn_implementation="sdpa")
    except (ValueError, TypeError, ZeroDivisionError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{where}={fields}: makes no model ({reason}); correct it") from None
    if getattr(body, "pooler", None) is not None:
        # It would get no gradient: objectives read states alone.
        body.pooler = None
    return body


def _require_length(main: Any, longest: int) -> None:
    most = getattr(main.config, "max_position_embeddings", None)
    if most is not None and longest > most:
        raise ValueError(
            f"model.max_position_embeddings={most}: rows have up to {longest} positions; raise it, "
            "or lower data.length"
        )


def _require_direction(main: Any, is_causal: bool) -> None:
    """Refuse, by ValueError, a decoder where an encoder is needed, and the other way round."""
    was_training = main.training
    main.eval()
    with torch.no_grad():
        rows = torch.zeros(2, 3, dtype=torch.long)
        rows[1, 2] = 1
        first, second = main(input_ids=rows, attention_mask=rows * 0 + 1).last_hidden_state[:, 0]
    main.train(was_training)
    if torch.equal(first, second) != is_causal:
        has, needs = ("an encoder", "a decoder") if is_causal else ("a decoder", "an encoder")
        raise ValueError(
            f"model.model_type={main.config.model_type}: is {has}, but the objective needs "
            f"{needs}; take {'llama or qwen2' if is_causal else 'bert or electra'}, for example"
        )
