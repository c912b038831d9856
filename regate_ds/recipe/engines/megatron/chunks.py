"""The recipe's student as Megatron-core's model chunks: tower and projector before a GPTModel.

The tower and the projector are copies of the Hugging Face student's own modules. Every tensor rank
of the first stage holds them whole, computes the same features, and gets their whole gradient.

Shapes: B rows, T positions, I images, P features of an image, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module, MegatronModule
from torch import Tensor, nn

from regate_ds.families.table import family_of
from regate_ds.parallel.resharding import SequenceCut
from regate_ds.recipe.config.sections import ParallelConfig
from regate_ds.recipe.engines.megatron.decoder import gpt_chunk, transformer_config
from regate_ds.recipe.engines.megatron.experts import SplitExperts
from regate_ds.recipe.engines.megatron.lora import Adapters, add_adapters, start_adapters
from regate_ds.recipe.engines.megatron.weights import TextWeights, load_cut
from regate_ds.recipe.students.config import ModelConfig
from regate_ds.recipe.students.stored import source_of_student
from regate_ds.recipe.students.student import Student, fresh_model
from regate_ds.recipe.students.trainable import adapter_starts
from regate_ds.teacher.backbone import text_backbone
from regate_ds.teacher.sharding.weights import WeightSource

_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


class StudentChunk(MegatronModule):
    """One part of the decoder, with its adapters; the first also has tower and projector."""

    def __init__(
        self,
        gpt: GPTModel,
        vision: nn.Module | None,
        image_id: int,
        adapters: Adapters | None = None,
    ) -> None:
        super().__init__(config=gpt.config)
        self.gpt, self.vision, self._image_id = gpt, vision, image_id
        self.adapters = adapters
        # Megatron's schedules and its finalisation of gradients read these attributes.
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = gpt.pre_process, gpt.post_process
        self.vp_stage = gpt.vp_stage
        self.share_embeddings_and_output_weights = gpt.share_embeddings_and_output_weights

    def forward(
        self,
        ids_BT: Tensor,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        lengths: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Return losses [B, T] of the labels, or the input of the next part.

        Labels and result are those of this context rank's part of T; the ids are whole. lengths:
        those of the samples, if the one row holds several.
        """
        positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        decoder_input = None
        if self.pre_process:
            decoder_input = self._embedded(ids_BT, positions_BT, pixel_values, lengths)
        ids_BT, positions_BT = (context_part(x_BT, 1, lengths) for x_BT in (ids_BT, positions_BT))
        return self.gpt(
            ids_BT,
            positions_BT,
            None,
            decoder_input=decoder_input,
            labels=labels,
            packed_seq_params=None if lengths is None else _bounds(lengths, ids_BT.device),
        )

    def _embedded(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor,
        pixels: Tensor | None,
        lengths: tuple[int, ...] | None,
    ) -> Tensor:
        """Return [T, B, H], or this rank's part of T under context and sequence parallelism."""
        words_TBH = self.gpt.embedding(input_ids=ids_BT, position_ids=positions_BT)
        if pixels is not None:
            assert self.vision is not None
            words_BTH = words_TBH.transpose(0, 1)
            features_IPH = torch.stack(list(_features(self.vision, pixels.to(words_BTH.dtype))))
            is_image_BT1 = (ids_BT == self._image_id).unsqueeze(-1)
            merged_BTH = words_BTH.masked_scatter(is_image_BT1, features_IPH.to(words_BTH.dtype))
            words_TBH = merged_BTH.transpose(0, 1).contiguous()
        words_TBH = context_part(words_TBH, 0, lengths)
        if self.config.sequence_parallel:
            # Its backward gathers, so every tensor rank gets the gradient of the whole sequence.
            words_TBH = scatter_to_sequence_parallel_region(words_TBH)
        if torch.is_grad_enabled() and not words_TBH.requires_grad:
            # Behind a frozen embedding. A layer that is computed again needs an input that asks for
            # a gradient, or its adapters get none.
            words_TBH.requires_grad_()
        return words_TBH

    def set_input_tensor(self, input_tensor: Any) -> None:
        self.gpt.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        return self.gpt.shared_embedding_or_output_weight()


def context_part(x: Tensor, dim: int, lengths: tuple[int, ...] | None = None) -> Tensor:
    """Return this context rank's part of the sequence along ``dim``.

    lengths: those of the samples, if it holds several, of each of which the rank has a part.
    """
    size = mpu.get_context_parallel_world_size()
    if size == 1:
        return x
    cut = SequenceCut(size).held(*(lengths or (x.shape[dim],)))
    return x.index_select(dim, cut[mpu.get_context_parallel_rank()].to(x.device))


def _bounds(lengths: tuple[int, ...], device: torch.device) -> PackedSeqParams:
    """Return where the samples of a packed row lie, what fills them up among their tokens."""
    bounds = torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32, device=device)
    return PackedSeqParams("thd", bounds, bounds, None, None, max(lengths), max(lengths))


def _features(vision: Any, pixels: Tensor) -> Sequence[Tensor]:
    return vision.get_image_features(pixel_values=pixels, return_dict=True).pooler_output


def decoder_config(text: Any, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """Return Megatron's settings for the student's decoder, cut as ``parallel`` says."""
    return transformer_config(
        text,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Only CUDA has batched transfers.
        batch_p2p_comm=torch.cuda.is_available(),
        deallocate_pipeline_outputs=True,
        finalize_model_grads_func=finalize_model_grads,
        **_RECOMPUTE[parallel.recompute],
    )


def build_chunks(
    student: Student,
    model: ModelConfig,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    seed: int,
) -> list[DistributedDataParallel]:
    """Build this rank's part of the student with its weights, wrapped for data parallelism.

    Adapters begin as peft's do with ``seed``. The student itself is left as it is. Where it lies on
    "meta", its weights are read from its folder, and of each only the part that this rank has.
    """
    backbone = text_backbone(student.model)
    config = decoder_config(backbone.config, parallel, dtype)
    weights = source_of_student(student, model)
    decoder, lora, chunks = family_of(student.model).decoder, model.lora, []
    text = SplitExperts(TextWeights(weights, decoder))
    for number in range(parallel.virtual):
        gpt = gpt_chunk(backbone.config, config, number if parallel.virtual > 1 else None)
        load_cut([gpt], text, backbone.config)
        vision = _vision(student, model, weights) if gpt.pre_process else None
        adapters = None if lora is None else add_adapters(gpt, backbone.config, lora)
        chunks.append(StudentChunk(gpt, vision, student.model.config.image_token_id, adapters))
    if lora is not None:
        own = [chunk.adapters for chunk in chunks if chunk.adapters is not None]
        start_adapters(own, adapter_starts(student, lora, seed=seed), decoder)
    return [_wrap(chunk.train(), config, parallel) for chunk in chunks]


def _vision(student: Student, config: ModelConfig, weights: WeightSource) -> nn.Module:
    """Return the student without its decoder, filled with its weights."""
    family = family_of(student.model)
    settings = copy.deepcopy(student.model.config)
    text: Any = settings.get_text_config()
    # Tables that lie in no file are computed where a model is made, so it is made, without layers.
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 0, 1, None
    made: Any = fresh_model(type(student.model), settings, seed=0)
    made.set_attn_implementation(config.attn_implementation)
    vision: Any = made.model
    setattr(vision, family.decoder, None)
    with torch.no_grad():
        for name, value in vision.state_dict().items():
            value.copy_(weights.read(f"model.{name}"))
    if config.lora is not None:
        vision.requires_grad_(False)
    elif config.freeze_vision:
        getattr(vision, family.tower).requires_grad_(False)
    return vision


def _wrap(
    chunk: nn.Module, config: TransformerConfig, parallel: ParallelConfig
) -> DistributedDataParallel:
    chunk = chunk.to("cuda" if torch.cuda.is_available() else "cpu")
    inner = Float16Module(config, chunk) if config.bf16 else chunk
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    return DistributedDataParallel(config, settings, inner)


def student_chunks(chunks: Sequence[nn.Module]) -> list[StudentChunk]:
    """Find the StudentChunks inside their wrappers."""
    return [m for chunk in chunks for m in chunk.modules() if isinstance(m, StudentChunk)]
