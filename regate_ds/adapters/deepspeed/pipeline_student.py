"""A Hugging Face model as a DeepSpeed pipeline whose layers take plans."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn

from regate_ds.adapters.deepspeed.pipeline_layers import Decoder, Desk, take_apart
from regate_ds.adapters.huggingface.gates import has_tower
from regate_ds.adapters.huggingface.support import require_language_model, require_supported_decoder
from regate_ds.config import RegateConfig
from regate_ds.families.text_decoders import TEXT_DECODERS


class PipelineStudent(PipelineModule):
    """A model in pipeline stages whose layers take plans; made by ``pipeline_student``."""

    def __init__(self, config: RegateConfig, desk: Desk, host: Any, **options: Any) -> None:
        # Not the ends: integers go into the first layer, and the last one is small.
        options.setdefault("checkpointable_layers", [Decoder.__name__])
        super().__init__(loss_fn=self._loss, dynamic_shape=True, **options)
        self.regate_config, self.desk = config, desk
        self.scale, self.losses = 1.0, dict[int, Tensor]()
        self._host_loss = host.loss_function
        self._vocab_size = host.config.get_text_config().vocab_size

    def _loss(self, output: tuple[Tensor, Tensor, Tensor], labels: Tensor) -> Tensor:
        """Averaged over micro-batches and data ranks, as the engine does, the mean over targets."""
        value, losses_L, number = output
        if self.desk.of(number).plan is None:
            return self._host_loss(value, labels, self._vocab_size)
        self.losses[len(number) - 1] = losses_L.detach()
        return value * self.scale


def pipeline_student(
    model: nn.Module, config: RegateConfig, *, num_stages: int, **options: Any
) -> PipelineStudent:
    """Take a Hugging Face model apart into stages; it cannot be used on its own any more.

    options: of ``deepspeed.pipe.PipelineModule``, such as ``partition_method`` and
        ``activation_checkpoint_interval``.

    ValueError names what is not supported.
    """
    require_language_model(model, model)
    host: Any = model
    decoder = host.get_decoder()
    _require_pipeline(host, decoder, config)
    desk = Desk()
    several = dist.get_world_size() > num_stages
    layers = take_apart(
        host,
        desk,
        first_layer=config.first_layer if config.enabled else -1,
        needs_tower=several and has_tower(host),
    )
    return PipelineStudent(config, desk, host, layers=layers, num_stages=num_stages, **options)


def _require_pipeline(host: Any, decoder: Any, config: RegateConfig) -> None:
    depth = len(decoder.layers)
    last = depth if config.last_layer is None else config.last_layer
    require_supported_decoder(host, decoder, config.first_layer, last)
    if last < depth:
        raise ValueError(
            f"last_layer={last} ends before the depth of {depth}: stages of a pipeline carry kept "
            "tokens to the end; set last_layer to null"
        )
    if host.get_output_embeddings().weight is host.get_input_embeddings().weight:
        raise ValueError(
            "the model ties its input and output embeddings, which lie on two stages; untie them "
            "(tie_word_embeddings=False) or train without a pipeline"
        )
    if TEXT_DECODERS[decoder.config.model_type].num_position_axes > 1:
        raise ValueError(
            f"decoder {decoder.config.model_type!r} has rotary positions of several axes, which "
            "the pipeline does not carry; train it without a pipeline"
        )
