"""A multimodal model's own decoder and head, without what is there for images.

This is for classes whose text no causal language model of transformers computes alike.

Shapes: B samples, T positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutput

from regate_ds.algorithm.loss import LogitChange

IMAGE_PART = "embed_tokens_extend"
"""The part of Phi-4 multimodal's decoder that holds its towers. On text alone it does nothing."""


class HostText(nn.Module):
    """A decoder and a head, made new on the current default device."""

    def __init__(
        self, kind: type[Any], config: PreTrainedConfig, change: LogitChange, head: nn.Linear
    ) -> None:
        """kind: class of the decoder; config: the decoder's; head: a head of the same shape."""
        super().__init__()
        self.config = config
        self.change = change
        self.model = kind(config)
        if hasattr(self.model, IMAGE_PART):
            setattr(self.model, IMAGE_PART, _NoImages())
        has_bias = head.bias is not None
        self.lm_head = nn.Linear(head.in_features, head.out_features, bias=has_bias)

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def tie_weights(self) -> None:
        """Let the head share the embedding's weight."""
        self.lm_head.weight = self.get_input_embeddings().weight

    def empty(self) -> HostText:
        """Return one like this without values, on the current default device."""
        return HostText(type(self.model), self.config, self.change, self.lm_head)

    def forward(self, **inputs: Any) -> CausalLMOutput:
        """Return the logits [B, T, V] of all positions."""
        hidden_BTH: Tensor = self.model(**inputs).last_hidden_state
        logits_BTV: Any = self.change.apply(self.lm_head(hidden_BTH))
        return CausalLMOutput(logits=logits_BTV)


class _NoImages(nn.Module):
    def forward(self, input_ids: Tensor, inputs_embeds: Tensor, **images: Any) -> Tensor:
        return inputs_embeds


@torch.no_grad()
def fill_tables(view: Any, decoder: Any) -> None:
    """Give a decoder that was made on "meta" the tables of another: they are not weights.

    The rotary table is computed again, because a model that was cast has it in low precision.
    """
    device = decoder.get_input_embeddings().weight.device
    if getattr(view, "rotary_emb", None) is not None:
        view.rotary_emb = type(view.rotary_emb)(config=view.config).to(device)
    for name, table in list(view.named_buffers()):
        if table.is_meta:
            path, _, leaf = name.rpartition(".")
            setattr(view.get_submodule(path), leaf, decoder.get_buffer(name).clone())
