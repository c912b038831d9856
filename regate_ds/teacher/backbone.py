"""The default teacher: the student's own decoder and head, as a causal language model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from regate_ds.families.table import find_family

_ONLY_MROPE = {"architectures", "mrope_section", "model_type", "transformers_version"}
"""Keys of a config with several rotary axes that the config of plain text does not have."""


def text_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """Make a causal language model of the student's decoder and head, without copying a weight.

    Its parameters are new objects on the same storage: freezing it does not freeze the student, but
    training the student changes it. On text it gives the student's logits. For a family with
    several rotary axes it counts plain positions, which equal positions on all axes.
    """
    config = _text_config(model)
    with torch.device("meta"):
        view = AutoModelForCausalLM.from_config(
            config, attn_implementation=model.config._attn_implementation
        )
    family = find_family(model)
    decoder: Any = model.model.language_model if family is None else family.decoder_of(model)
    weights = {f"model.{name}": value for name, value in decoder.state_dict().items()}
    weights["lm_head.weight"] = model.lm_head.weight.detach()
    view.load_state_dict(weights, strict=True, assign=True)
    # If head and embedding share one parameter, they must share it here too.
    view.tie_weights()
    # The rotary table is not a weight: compute it from the config, because it is still on "meta".
    view.model.rotary_emb = type(view.model.rotary_emb)(config=config).to(model.device)
    return view.eval()


def _text_config(model: PreTrainedModel) -> PreTrainedConfig:
    config = model.config.get_text_config()
    fields = config.to_dict()
    family = find_family(model)
    config_class = type(config)
    if family is not None and family.plain_text is not None:
        fields = {name: value for name, value in fields.items() if name not in _ONLY_MROPE}
        rope = fields["rope_parameters"]
        fields["rope_parameters"] = {k: v for k, v in rope.items() if k not in _ONLY_MROPE}
        config_class = CONFIG_MAPPING[family.plain_text]
    fields["tie_word_embeddings"] = model.config.tie_word_embeddings
    return config_class(**{**fields, "dtype": model.dtype})
