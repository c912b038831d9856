"""The default teacher: the student's own decoder and head, as a language model of text."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from regate_ds.algorithm.loss import LogitChange
from regate_ds.families.hosts import change_alone, supported
from regate_ds.families.table import find_family
from regate_ds.teacher.host_text import IMAGE_PART, HostText, fill_tables

_ONLY_MROPE = {"architectures", "mrope_section", "model_type", "transformers_version"}
"""Keys of a config with several rotary axes that the config of plain text does not have."""


def text_backbone(model: PreTrainedModel) -> PreTrainedModel | HostText:
    """Make a language model of the student's decoder and head, without copying a weight.

    Its parameters are new objects on the same storage: freezing it does not freeze the student, but
    training the student changes it. On text it gives the student's logits. It is a causal language
    model of transformers where there is one that does, else a ``HostText``. With several rotary
    axes it counts plain positions, which equal positions on all axes.

    ValueError for a class that no test has compared.
    """
    if hasattr(model, "get_base_model") or any("lora_" in n for n, _ in model.named_parameters()):
        raise ValueError(
            f"{type(model).__name__} has adapters of low rank, which are no part of the teacher; "
            "make the teacher before they are added"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"{type(model).__name__} is quantized, and a teacher of its weights would read codes "
            "for numbers; load the teacher by itself (open_teacher)"
        )
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has weights that ZeRO-3 has cut, of which no teacher can be "
            "made: score before TrainingArguments or deepspeed.zero.Init are made, or load the "
            "teacher by itself (open_teacher)"
        )
    change = supported(model).change
    view = _causal_form(model, change)
    if view is None:
        view = _own_form(model, change)
    return view.eval()


def _causal_form(model: Any, change: LogitChange) -> PreTrainedModel | None:
    """Return the view as transformers' causal language model, or None if none has these logits."""
    decoder = model.get_decoder()
    config = _text_config(model)
    if type(config) not in AutoModelForCausalLM._model_mapping or change_alone(config) != change:
        return None
    config._attn_implementation = model.config._attn_implementation
    # Not by from_config, which would cut the weights where TrainingArguments have ZeRO-3 in them.
    causal: Any = AutoModelForCausalLM._model_mapping[type(config)]
    with torch.device("meta"):
        view = causal(config)
    parts = {name for name, _ in view.named_children()}
    if parts != {"model", "lm_head"} or hasattr(view.model, IMAGE_PART):
        return None
    view.load_state_dict(_weights(decoder, model.get_output_embeddings()), strict=True, assign=True)
    # If head and embedding share one parameter, they must share it here too.
    view.tie_weights()
    fill_tables(view.model, decoder)
    return view


def _own_form(model: Any, change: LogitChange) -> HostText:
    """Return the view with a decoder of the student's own class."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    is_tied = _is_tied(model)
    config = deepcopy(decoder.config)
    config.dtype = model.dtype
    config.tie_word_embeddings = is_tied
    # The name of a teacher is a hash over its config, and must tell apart what changes its losses.
    config.logit_change = asdict(change)
    with torch.device("meta"):
        view = HostText(type(decoder), config, change, head)
    view.load_state_dict(_weights(decoder, head), strict=True, assign=True)
    if is_tied:
        view.tie_weights()
    fill_tables(view.model, decoder)
    return view


def _is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _weights(decoder: nn.Module, head: nn.Module) -> dict[str, Tensor]:
    """Return the weights by their names in the view."""
    weights = {f"model.{name}": value for name, value in decoder.state_dict().items()}
    weights |= {f"lm_head.{name}": value for name, value in head.state_dict().items()}
    return {n: value for n, value in weights.items() if not n.startswith(f"model.{IMAGE_PART}.")}


def _text_config(model: Any) -> PreTrainedConfig:
    config = model.config.get_text_config()
    fields = config.to_dict()
    family = find_family(model)
    config_class = type(config)
    if family is not None and family.plain_text is not None:
        fields = {name: value for name, value in fields.items() if name not in _ONLY_MROPE}
        rope = fields["rope_parameters"]
        fields["rope_parameters"] = {k: v for k, v in rope.items() if k not in _ONLY_MROPE}
        config_class = CONFIG_MAPPING[family.plain_text]
    # Not every config says it.
    is_tied = getattr(model.config, "tie_word_embeddings", None)
    fields["tie_word_embeddings"] = _is_tied(model) if is_tied is None else is_tied
    return config_class(**{**fields, "dtype": model.dtype})
