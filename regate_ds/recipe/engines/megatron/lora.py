"""LoRA on the decoder's linear layers, as peft has it: y + alpha / rank * up(down(dropout(x))).

Each of peft's adapters keeps its own two matrices where Megatron-core joins several layers of
Hugging Face in one: their updates are joined as its outputs are. Megatron's layers and the names of
their weights stay as they are; a hook adds the update to what a layer returns.

Shapes: S positions, B rows, I inputs, O outputs, R the update's rank; each this tensor rank's part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from regate_ds.recipe.config.megatron_limits import inner_size
from regate_ds.recipe.engines.megatron.names import head_size
from regate_ds.recipe.engines.megatron.norm import rms_norm
from regate_ds.recipe.students.config import LoraConfig

_COLUMNS = {
    "self_attention.linear_qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "mlp.linear_fc1": ("mlp", ("gate_proj", "up_proj")),
}
"""Megatron's layers whose outputs are cut, with the block and the layers of Hugging Face."""

_ROWS = {
    "self_attention.linear_proj": ("self_attn", ("o_proj",)),
    "mlp.linear_fc2": ("mlp", ("down_proj",)),
}
"""Those whose inputs are cut."""

_BLOCKS = {name: block for block, names in [*_COLUMNS.values(), *_ROWS.values()] for name in names}


class Adapter(nn.Module):
    """The two matrices of one of peft's adapters, or this tensor rank's part of them."""

    def __init__(self, sizes: tuple[int, int], lora: LoraConfig, *, is_row: bool, cuts: bool):
        """Take inputs and outputs of this rank, and whether the sequence is cut beside them.

        ``up`` begins at zero, ``down`` is left to ``start_adapters``.
        """
        super().__init__()
        self.down = nn.Parameter(torch.empty(lora.rank, sizes[0]))
        self.up = nn.Parameter(torch.zeros(sizes[1], lora.rank))
        self.scale, self.dropout = lora.alpha / lora.rank, lora.dropout
        self.is_row, self.cuts_sequence = is_row, cuts
        cut, whole = (self.down, self.up) if is_row else (self.up, self.down)
        set_tensor_model_parallel_attributes(cut, True, int(is_row), 1)
        # The rank that has all of this matrix has a part of its input, so Megatron sums gradients.
        whole.sequence_parallel = cuts  # type: ignore[attr-defined]

    def forward(self, x_SBI: Tensor) -> Tensor:
        """Return the update [S, B, O], in the layout of positions that the layer itself returns."""
        if self.training and self.dropout:
            x_SBI = self._dropped(x_SBI)
        low_SBR = self._joined(F.linear(x_SBI, self.down))
        return F.linear(self.scale * low_SBR, self.up)

    def _joined(self, low_SBR: Tensor) -> Tensor:
        """Exchange what the layer itself exchanges, in R numbers a position."""
        if self.is_row and self.cuts_sequence:
            return reduce_scatter_to_sequence_parallel_region(low_SBR)
        if self.is_row:
            return reduce_from_tensor_model_parallel_region(low_SBR)
        if self.cuts_sequence:
            return gather_from_sequence_parallel_region(low_SBR)
        return copy_to_tensor_model_parallel_region(low_SBR)

    def _dropped(self, x_SBI: Tensor) -> Tensor:
        """Zero a share of the inputs: the same ones on all tensor ranks where these have them all.

        Else each draws its own, from the random state that Megatron keeps for that.
        """
        has_a_part = self.is_row or self.cuts_sequence
        with get_cuda_rng_tracker().fork() if has_a_part else nullcontext():
            return F.dropout(x_SBI, self.dropout)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[()] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return the matrices with their places in the whole ones."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"down": 1} if self.is_row else {"up": 0},
            sharded_offsets,
            tp_group=mpu.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )


class Adapters(nn.ModuleDict):
    """The adapters of a part of the decoder: a ModuleDict for each layer, by its number."""

    def named(self) -> Iterator[tuple[str, Adapter]]:
        """Yield each adapter by the name of its linear layer in a causal LM of Hugging Face."""
        for number, layer in self.items():
            for name, adapter in layer.items():  # type: ignore[operator]
                yield f"model.layers.{number}.{_BLOCKS[name]}.{name}", adapter

    def weights(self) -> dict[str, nn.Parameter]:
        """Return the matrices by peft's names, without what peft puts before them."""
        return {
            f"{name}.lora_{letter}.weight": weight
            for name, one in self.named()
            for letter, weight in (("A", one.down), ("B", one.up))
        }

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[()] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return all matrices for a distributed checkpoint; numbers count the whole model."""
        found: dict[str, Any] = {}
        for number, layer in self.items():
            for name, adapter in layer.items():  # type: ignore[operator]
                at = f"{prefix}{number}.{name}."
                found |= adapter.sharded_state_dict(at, sharded_offsets, metadata)
        return found


def adapter_names(text: Any, lora: LoraConfig) -> list[str]:
    """Return the names of ``Adapters.weights`` in the whole decoder with this config."""
    return [
        f"model.layers.{number}.{_BLOCKS[name]}.{name}.lora_{letter}.weight"
        for number in range(text.num_hidden_layers)
        for name in lora.target_modules
        for letter in "AB"
    ]


def add_adapters(gpt: GPTModel, text: Any, lora: LoraConfig) -> Adapters:
    """Freeze a part of the decoder, and hook adapters to its linear layers."""
    gpt.requires_grad_(False)
    cuts, size, found = gpt.config.sequence_parallel, _tensor_size(), Adapters()
    outputs = _num_outputs(text)
    groups = {"self_attention.linear_qkv": text.num_key_value_heads // size}
    for layer in gpt.decoder.layers:
        adapters = nn.ModuleDict()
        for where, (_, names) in [*_COLUMNS.items(), *_ROWS.items()]:
            if not set(names) & set(lora.target_modules):
                continue  # a layer of experts has no linear layers of these names
            linear: Any = layer.get_submodule(where)
            is_row, parts = where in _ROWS, []
            for name in names:
                sizes = linear.weight.shape[1], outputs[name] // (1 if is_row else size)
                one = None
                if name in lora.target_modules:
                    one = adapters[name] = Adapter(sizes, lora, is_row=is_row, cuts=cuts)
                parts.append((one, sizes[1]))
            linear.register_forward_hook(_Update(parts, groups.get(where, 1)))
        found[str(layer.layer_number - 1)] = adapters
    return found


def start_adapters(
    chunks: Sequence[Adapters], starts: Iterable[tuple[str, Tensor]], decoder: str
) -> None:
    """Give each ``down`` this rank's part of its first value.

    starts: whole matrices [R, inputs] by the names of their linear layers in the student.
    decoder: the decoder's name in the student.
    """
    own = {
        name.replace("model.", f"model.{decoder}.", 1): adapter
        for chunk in chunks
        for name, adapter in chunk.named()
    }
    with torch.no_grad():
        for name, whole in starts:
            if (adapter := own.pop(name, None)) is None:
                continue
            part = mpu.get_tensor_model_parallel_rank() if adapter.is_row else 0
            adapter.down.copy_(whole.split(adapter.down.shape[1], dim=1)[part])
    assert not own, f"no first values for {sorted(own)}"


def _tensor_size() -> int:
    return mpu.get_tensor_model_parallel_world_size()


def _num_outputs(text: Any) -> dict[str, int]:
    """Return the outputs of each linear layer in the whole decoder."""
    head = head_size(text)
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    hidden, inner = text.hidden_size, inner_size(text)
    attention = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": hidden}
    return {**attention, "gate_proj": inner, "up_proj": inner, "down_proj": hidden}


@dataclass(frozen=True)
class _Update:
    """The hook of one of Megatron's linear layers: adds what its adapters make."""

    parts: Sequence[tuple[Adapter | None, int]]
    """The layers that it joins, in order, with their outputs; None where one has no adapter."""

    groups: int
    """Groups of outputs, in each of which come first those of the first part."""

    def __call__(self, linear: Any, inputs: tuple[Tensor], output: tuple[Tensor, Any]) -> Any:
        x_SBI, (y_SBO, bias) = inputs[0], output
        if hasattr(linear, "layer_norm_weight"):
            # Transformer Engine's layer normalizes its input itself, and keeps the result.
            x_SBI = rms_norm(x_SBI, linear.layer_norm_weight, linear.eps)
        updates = [
            y_SBO.new_zeros(*y_SBO.shape[:-1], size) if adapter is None else adapter(x_SBI)
            for adapter, size in self.parts
        ]
        joined = torch.cat([one.unflatten(-1, (self.groups, -1)) for one in updates], dim=-1)
        return y_SBO + joined.flatten(-2), bias
