"""Adapters on Megatron-core's layers against peft's: losses, gradients, and what is frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor, nn
from torch.nn import functional as F

from regate_ds.recipe.config.sections import ParallelConfig
from regate_ds.recipe.engines.megatron.chunks import build_chunks
from regate_ds.recipe.engines.megatron.decoder import gpt_chunk, transformer_config
from regate_ds.recipe.engines.megatron.experts import SplitExperts
from regate_ds.recipe.engines.megatron.lora import Adapter, Adapters, add_adapters
from regate_ds.recipe.engines.megatron.norm import rms_norm
from regate_ds.recipe.engines.megatron.weights import load_cut
from regate_ds.recipe.students.config import LoraConfig, ModelConfig
from regate_ds.recipe.students.load import load_student
from regate_ds.teacher.sharding.weights import LoadedWeights
from tests.adapters.megatron.build_helper import join
from tests.adapters.megatron.cases_helper import Case
from tests.adapters.megatron.checks_helper import dismantle
from tests.recipe.engines.runs_helper import Reading
from tests.support.models import VOCABULARY, causal_lm

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterCase:
    kind: str = "llama"
    targets: tuple[str, ...] = ALL
    layout: Case = Case()
    fused_norm: bool = False
    """As Transformer Engine's layers, which normalize their input themselves."""


def check_adapters(case: AdapterCase) -> tuple[float, float]:
    """Largest difference of any token's loss and of any adapter's gradient, by their sizes."""
    join(case.layout)
    model = causal_lm(case.kind, vocab_size=VOCABULARY + 3, num_layers=2)
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    config = model.config
    lora = LoraConfig(rank=3, alpha=6.0, target_modules=case.targets)
    theirs: Any = peft.get_peft_model(
        model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(case.targets))
    )
    torch.manual_seed(2)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.3)
    gpt = gpt_chunk(config, transformer_config(config, sequence_parallel=case.layout.sp))
    load_cut([gpt], SplitExperts(LoadedWeights(base)), config)
    if case.fused_norm:
        fuse_norms(gpt)
    adapters = add_adapters(gpt, config, lora)
    wanted = {
        name.removeprefix("base_model.model.").replace(".default", ""): weight
        for name, weight in theirs.named_parameters()
        if "lora_" in name
    }
    own = adapters.weights()
    assert own.keys() == wanted.keys()
    for name, weight in own.items():
        weight.data.copy_(part(wanted[name].data, weight))
    ids = torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))
    losses = losses_of(gpt, ids)
    losses.sum().backward()
    logits = theirs(ids).logits.flatten(0, 1)
    plain = F.cross_entropy(logits, ids.flatten(), reduction="none").view_as(ids)
    plain.sum().backward()
    assert not any(weight.requires_grad for weight in gpt.parameters())
    errors = [
        float((summed(weight) - part(wanted[name].grad, weight)).norm() / wanted[name].grad.norm())
        for name, weight in own.items()
    ]
    return float((losses - plain).abs().max() / plain.abs().max()), max(errors)


def part(whole: Any, like: Any) -> Tensor:
    """This tensor rank's part of a matrix of an adapter."""
    if not getattr(like, "tensor_model_parallel", False):
        return whole
    parts = whole.chunk(mpu.get_tensor_model_parallel_world_size(), dim=like.partition_dim)
    return parts[mpu.get_tensor_model_parallel_rank()]


def summed(weight: Any) -> Tensor:
    """Its gradient, as Megatron finishes it."""
    if getattr(weight, "sequence_parallel", False):
        dist.all_reduce(weight.grad, group=mpu.get_tensor_model_parallel_group())
    return weight.grad


def losses_of(gpt: Any, ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    words = gpt.embedding(ids, positions)
    if gpt.config.sequence_parallel:
        words = scatter_to_sequence_parallel_region(words)
    return gpt(ids, positions, mask, decoder_input=words.requires_grad_(), labels=ids)


class FusedNorm(ColumnParallelLinear):
    """Stands in for TELayerNormColumnParallelLinear."""

    def forward(self, input_: Tensor, *more: Any, **settings: Any) -> Any:
        weight: Any = self.layer_norm_weight
        eps: Any = self.eps
        return super().forward(rms_norm(input_, weight, eps), *more, **settings)


def fuse_norms(gpt: Any) -> None:
    """Move the norms of each layer into the linear layers behind them."""
    for layer in gpt.decoder.layers:
        for name, linear in (
            ("input_layernorm", layer.self_attention.linear_qkv),
            ("pre_mlp_layernorm", layer.mlp.linear_fc1),
        ):
            norm = getattr(layer, name)
            linear.__class__ = FusedNorm
            linear.layer_norm_weight, linear.eps = norm.weight, norm.eps
            setattr(layer, name, nn.Identity())


def check_frozen(case: Reading) -> None:
    """Frozen weights have no place in the buffers of gradients."""
    join(case.layout)
    student = load_student(case.folder / "student", weights=False)
    lora = LoraConfig(rank=2, target_modules=ALL)
    model = ModelConfig(path=case.folder / "student", lora=lora)
    layout = ParallelConfig(tensor=case.layout.tp, pipeline=case.layout.pp, sequence=case.layout.sp)
    made = build_chunks(student, model, layout, torch.float32, seed=3)
    for chunk in made:
        trained = [weight for weight in chunk.parameters() if weight.requires_grad]
        (adapters,) = [m for m in chunk.modules() if isinstance(m, Adapters)]
        assert len(trained) == len(adapters.weights()) > 0
        held = sum(buffer.grad_data.numel() for buffer in chunk.buffers)
        # Megatron fills the buffer's buckets up to its own multiples.
        assert sum(w.numel() for w in trained) <= held < 1.2 * sum(w.numel() for w in trained)
    dismantle(made)


def check_dropout(layout: Case) -> tuple[Tensor, ...]:
    """What each kind of adapter lets through of 64 ones: its outputs are cut, or its inputs."""
    join(layout)
    torch.manual_seed(5)
    # As on CUDA: the shim has one random state for all ranks.
    tracker, rank = get_cuda_rng_tracker(), mpu.get_tensor_model_parallel_rank()
    own = torch.Generator().manual_seed(rank).get_state()
    tracker.set_states(dict.fromkeys(tracker.get_states(), own))
    lora, found = LoraConfig(rank=4, alpha=4.0, dropout=0.5), []
    for is_row in (False, True):
        one = Adapter((64, 4), lora, is_row=is_row, cuts=False).train()
        with torch.no_grad():
            one.down.zero_()
            one.down[0] = 1.0
            one.up[:, 0] = 1.0
        # The row adapter adds up its ranks' inputs, so each rank has its own 64 of 128 positions.
        x_SBI, at = torch.zeros(128, 1, 64), 64 * rank * is_row
        x_SBI[at : at + 64, 0] = torch.eye(64)
        kept = one(x_SBI)[at : at + 64, 0, 0].detach()
        assert set(kept.unique().tolist()) == {0.0, 2.0}
        assert torch.equal(one.eval()(x_SBI)[at : at + 64, 0, 0], torch.ones(64))
        found.append(kept)
    return tuple(found)
