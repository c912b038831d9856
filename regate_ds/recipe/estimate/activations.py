"""Bytes that a step keeps for its backward pass, without running it.

The host's own decoder runs on fake tensors of torch, which have shapes and no values. So what is
counted is what its code saves, in kernels of a CPU, whose attention saves what a fused kernel does.

Memory is highest in the backward pass of one layer: what it and the layers before it have saved is
there, and the gradients of its own activations. Where layers are checkpointed, the inputs of all
are there in place of what they saved. Where the MLPs alone are gated, layers count as whole ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from regate_ds.algorithm.executions.execution import Span
from regate_ds.algorithm.loss import CHUNK
from regate_ds.cost.flops import RowCounts
from regate_ds.recipe.bench.measures import SavedBytes

_CAUSAL = "regate_estimate"

GRADIENTS = 0.66
"""Bytes of the gradients of a layer's activations, as a share of what it saved: of Llamas."""


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on the rank that holds all layers."""

    layers: float
    """The most that is alive of the decoder's layers at once."""

    head: float
    """The head's logits of one chunk, and its gradients."""

    @property
    def total(self) -> float:
        return self.layers + self.head


def activations_of(
    host: Any, rows: RowCounts, spans: Sequence[Span], dtype: torch.dtype, *, recompute: bool
) -> Activations:
    """Return the activations of a step with these spans; without spans it is dense.

    host: a transformers model with a head, on "meta" or not.
    """
    full = _saved(host, rows.count, round(rows.length), dtype)
    kept = full
    if spans:
        kept = _saved(host, rows.count, max(1, round(rows.slots)), dtype)
    gated = {n: span.part for span in spans for n in range(span.first, span.last)}
    hidden, size = host.get_decoder().config.hidden_size, dtype.itemsize
    held, peak = 0.0, 0.0
    for number in range(len(full)):
        in_slots = gated.get(number) in ("layer", "backward")
        own = kept[number] if in_slots else full[number]
        length = rows.slots if in_slots else rows.length
        # The backward pass comes to this layer when those behind it are done.
        held += rows.count * length * hidden * size if recompute else own
        peak = max(peak, held + own * (GRADIENTS + recompute))
    return Activations(peak, _head(host, rows.num_targets, size))


def _head(host: Any, num_targets: float, size: int) -> float:
    weight = host.get_output_embeddings().weight
    vocabulary, hidden = weight.shape
    # The logits of a chunk and what their softmax makes of them; the gradient of the rows.
    held = 2 * min(CHUNK, num_targets) * vocabulary * 4 + num_targets * hidden * size
    return held + (weight.numel() * 4 if weight.requires_grad else 0)


def _saved(host: Any, num_rows: int, length: int, dtype: torch.dtype) -> list[int]:
    """Return the bytes that each decoder layer saves for rows of this length."""
    decoder = host.get_decoder()
    with FakeTensorMode():
        tensors = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
        state = {name: _like(tensor, dtype) for name, tensor in tensors.items()}
        saved = SavedBytes(decoder.layers, state.values())
        embedded = torch.empty(
            num_rows, length, decoder.config.hidden_size, dtype=dtype, requires_grad=True
        )
        with saved.watching(), _without_mask(decoder.config):
            _run(decoder, state, embedded)
    return saved.by_layer


@contextmanager
def _without_mask(config: Any) -> Iterator[None]:
    """Let attention be causal by itself, as it is in a run: on fake tensors transformers makes a
    mask, which is as large as a row squared."""
    before = config._attn_implementation
    if before != "eager":
        AttentionInterface.register(_CAUSAL, _causal_attention)
        config._attn_implementation = _CAUSAL
    try:
        yield
    finally:
        config._attn_implementation = before


def _causal_attention(module: Any, q: Tensor, k: Tensor, v: Tensor, _: Any, **given: Any) -> Any:
    return sdpa_attention_forward(module, q, k, v, None, **given)


def _run(decoder: Any, state: Mapping[str, Tensor], embedded: Tensor) -> None:
    arguments = {"inputs_embeds": embedded, "use_cache": False}
    try:
        functional_call(decoder, dict(state), (), arguments)
    except Exception as error:
        name = type(decoder).__name__
        raise ValueError(
            f"what {name} saves for its backward pass cannot be told without running it "
            f"({type(error).__name__}); measure it by `regate train` with run.steps=2"
        ) from error


def _like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    is_weight = isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point()
    return torch.empty(
        tensor.shape, dtype=dtype if is_weight else tensor.dtype, requires_grad=tensor.requires_grad
    )
