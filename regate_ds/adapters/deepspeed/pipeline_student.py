"""Turn a Hugging Face model into a DeepSpeed pipeline whose layers take plans."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn

from regate_ds.adapters.deepspeed.pipeline_layers import Decoder, MicroBatchTable, take_apart
from regate_ds.adapters.huggingface.empty_image import has_tower
from regate_ds.adapters.huggingface.support import require_host, require_span
from regate_ds.algorithm.executions.execution import gated_span
from regate_ds.algorithm.executions.table import require_execution
from regate_ds.config import RegateConfig, require_config
from regate_ds.families.hosts import Supported
from regate_ds.families.numbering import numbering_of
from regate_ds.families.text_decoders import TEXT_DECODERS, decoders_that


class PipelineStudent(PipelineModule):
    """A model in pipeline stages whose layers take plans; ``pipeline_student`` makes it."""

    def __init__(
        self, config: RegateConfig, table: MicroBatchTable, host: Any, **options: Any
    ) -> None:
        # Embed is not listed, because its inputs are integers, nor Head, because it is small.
        options.setdefault("checkpointable_layers", [Decoder.__name__])
        super().__init__(loss_fn=self._loss, dynamic_shape=True, **options)
        self.regate_config, self.table = config, table
        self.number_images = numbering_of(host, elides_images=config.chooses_images)
        """Numbers the images of a micro-batch that does not do so itself."""
        self.scale, self.losses, self.entropies = 1.0, dict[int, Tensor](), dict[int, Tensor]()
        self._with_entropy = config.records("entropy")
        self._host_loss = host.loss_function
        self._vocab_size = host.config.get_text_config().vocab_size

    def _loss(self, output: tuple[Tensor, Tensor, Tensor, Tensor], labels: Tensor) -> Tensor:
        """Return the loss, scaled so that the engine's average is the mean over the step's targets.

        The engine averages over micro-batches and data ranks. Without a plan it is the host's loss.
        """
        value, losses_L, entropy_L, number = output
        if self.table.look_up(number).plan is None:
            return self._host_loss(value, labels, self._vocab_size)
        self.losses[len(number) - 1] = losses_L.detach()
        if self._with_entropy:
            self.entropies[len(number) - 1] = entropy_L
        return value * self.scale


def pipeline_student(
    model: nn.Module, config: RegateConfig, *, num_stages: int, **options: Any
) -> PipelineStudent:
    """Make a pipeline of a Hugging Face model, which cannot be used on its own afterwards.

    options: further arguments of ``deepspeed.pipe.PipelineModule``, such as ``partition_method``
        and ``activation_checkpoint_interval``.

    ValueError names what is not supported.
    """
    require_config("config", config)
    host: Any = model
    support, decoder = require_host(model, host), host.get_decoder()
    _require_pipeline(host, decoder, config)
    table = MicroBatchTable()
    span = gated_span(config.execution.spans(config.first_layer, len(decoder.layers)))
    several_replicas = dist.get_world_size() > num_stages
    layers = take_apart(
        host,
        table,
        first_layer=span.first if config.enabled and span is not None else -1,
        needs_tower=several_replicas and has_tower(host),
        with_entropy=config.records("entropy"),
        **_merging(config, host, support),
    )
    return PipelineStudent(config, table, host, layers=layers, num_stages=num_stages, **options)


def _merging(config: RegateConfig, host: Any, support: Supported) -> dict[str, Any]:
    """Return what takes the model apart where a run has merged steps; ValueError if it cannot."""
    if not (config.enabled and config.merge.steps):
        return {}
    # Here, so that a run without merged steps does not load it.
    from regate_ds.adapters.merging.pipeline import merging_ends

    return {"ends": merging_ends(host, support)}


def _require_pipeline(host: Any, decoder: Any, config: RegateConfig) -> None:
    """Refuse a model or a gated range that the pipeline would compute wrongly."""
    name, depth = decoder.config.model_type, len(decoder.layers)
    last = depth if config.last_layer is None else config.last_layer
    require_span(config.first_layer, last, depth)
    require_execution(config.execution, "deepspeed_pipeline")
    if last < depth:
        raise ValueError(
            f"last_layer={last} ends before the depth of {depth} layers, but the stages of a "
            "pipeline pass on kept tokens to the end; set last_layer to null"
        )
    if host.get_output_embeddings().weight is host.get_input_embeddings().weight:
        raise ValueError(
            f"{type(host).__name__} ties its input and output embeddings, which lie on two stages; "
            "untie them (tie_word_embeddings=False) or train without a pipeline"
        )
    num_axes = TEXT_DECODERS[name].num_position_axes
    if num_axes > 1:
        raise ValueError(
            f"decoder {name!r} has rotary positions of several axes ({num_axes}), which the "
            "pipeline does not pass on; train it without a pipeline"
        )
    tested = decoders_that("in_pipeline")
    if name not in tested:
        raise ValueError(
            f"decoder {name!r} was not tested in a pipeline, only {tested}; train it without one"
        )
