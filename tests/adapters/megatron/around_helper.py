"""A model around a GPTModel that calls it as Megatron-Bridge's Qwen25VLModel (0.6.2) calls its own.

It embeds the tokens itself, cuts the sequence over tensor ranks itself, has positions of three axes
on every stage, and calls ``language_model.forward``, past all hooks of the module.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class Around(MegatronModule):
    def __init__(self, gpt: GPTModel) -> None:
        super().__init__(config=gpt.config)
        self.language_model = gpt
        self.pre_process, self.post_process = gpt.pre_process, gpt.post_process
        self.vp_stage, self.model_type = gpt.vp_stage, None
        self.share_embeddings_and_output_weights = gpt.share_embeddings_and_output_weights
        self.shared_embedding_or_output_weight = gpt.shared_embedding_or_output_weight

    def set_input_tensor(self, input_tensor: Any) -> None:
        self.language_model.set_input_tensor(input_tensor)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        embeddings = None
        if self.pre_process:
            embeddings = self.language_model.embedding(input_ids=input_ids, position_ids=None)
            if self.config.sequence_parallel:
                embeddings = scatter_to_sequence_parallel_region(embeddings)
        return self.language_model.forward(
            input_ids=None,
            position_ids=position_ids,
            attention_mask=attention_mask,
            decoder_input=embeddings,
            labels=labels,
            loss_mask=None,
            runtime_gather_output=None,
            packed_seq_params=packed_seq_params,
        )
