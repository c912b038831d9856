"""Measure how much attention each position of a vision tower receives, while the tower runs.

Shapes: L layers, B sequences, S positions, h heads, C queries of a block, D features of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

_NAME = "regate_attention_received"

_BLOCK = 1024
"""Number of queries whose attention to all keys exists at one time."""


class Received:
    """Computes attention as transformers' eager function does, and adds up what each key gets."""

    def __init__(self) -> None:
        self._calls: dict[nn.Module, list[Tensor]] = {}

    @property
    def layers_LBS(self) -> Tensor:
        """fp32: the attention that each position receives in each layer, mean over heads.

        A tower that calls the function for one image after the other has B = 1.
        """
        return torch.stack([torch.cat(calls, dim=1) for calls in self._calls.values()])

    def __call__(  # noqa: PLR0913 (transformers' own arguments)
        self,
        module: nn.Module,
        query_BhSD: Tensor,
        key_BhSD: Tensor,
        value_BhSD: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Return what the layer's output projection takes, [B, S, h, D]."""
        assert attention_mask is None, "a vision tower attends to whole images"
        received_BS, outputs = key_BhSD.new_zeros(key_BhSD.shape[::2], dtype=torch.float32), []
        for query_BhCD in query_BhSD.split(_BLOCK, dim=2):
            score_BhCS = query_BhCD @ key_BhSD.transpose(2, 3) * scaling
            weight_BhCS = score_BhCS.softmax(dim=-1, dtype=torch.float32)
            received_BS += weight_BhCS.sum(dim=2).mean(dim=1)
            outputs.append(weight_BhCS.to(value_BhSD.dtype) @ value_BhSD)
        self._calls.setdefault(module, []).append(received_BS)
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


@contextmanager
def measuring_attention(tower: nn.Module) -> Iterator[Received]:
    """Measure the attention of the tower's layers inside the block, and leave it as it was."""
    functions = import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    configs: list[Any] = [m.config for m in tower.modules() if hasattr(m, "config")]
    before = [config._attn_implementation for config in configs]
    received = functions[_NAME] = Received()
    try:
        for config in configs:
            config._attn_implementation = _NAME
        yield received
    finally:
        for config, name in zip(configs, before):
            config._attn_implementation = name
        del functions[_NAME]
