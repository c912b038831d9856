"""A Hugging Face decoder's weights inside Megatron-core: the same losses, and back unchanged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor, nn
from torch.nn import functional as F

from regate_ds.recipe.engines.megatron.decoder import gpt_chunk, transformer_config
from regate_ds.recipe.engines.megatron.experts import SplitExperts, join_experts
from regate_ds.recipe.engines.megatron.weights import (
    gather_to_first,
    load_cut,
)
from regate_ds.teacher.sharding.weights import LoadedWeights
from tests.adapters.megatron.build_helper import join
from tests.adapters.megatron.cases_helper import Case
from tests.recipe.engines.lora_helper import losses_of
from tests.support.models import VOCABULARY, causal_lm


@dataclass(frozen=True)
class BridgeCase:
    kind: str = "llama"
    tied: bool = False
    layout: Case = Case()
    rescales: bool = False
    """Whether Qwen's router makes the shares of the best experts add up to 1."""


def check_weights(case: BridgeCase) -> float:
    """Largest difference of any token's loss, and on one rank of any weight's gradient.

    Every weight comes back bit for bit.
    """
    join(case.layout)
    sizes = {"vocab_size": VOCABULARY + 3, "num_layers": 4, "tie_word_embeddings": case.tied}
    if case.kind == "qwen3_moe":
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        sizes |= {"norm_topk_prob": case.rescales, "head_dim": 16}
    model = causal_lm(case.kind, **sizes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight") or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    config = transformer_config(
        model.config, pipeline_dtype=torch.float32, sequence_parallel=case.layout.sp
    )
    chunk = gpt_chunk(model.config, config)
    load_cut([chunk], SplitExperts(LoadedWeights(model.state_dict())), model.config)

    back = join_experts(gather_to_first([chunk], model.config, torch.device("cpu")))
    assert bool(back) == (dist.get_rank() == 0)
    for name, weight in model.state_dict().items() if back else ():
        if name != "lm_head.weight" or not case.tied:
            assert torch.equal(back[name], weight), name
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        return 0.0
    # Expert ranks have rows of their own, of different lengths.
    rank, drawn = mpu.get_data_parallel_rank(), torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (2, 8 + 4 * rank), generator=drawn)
    found = losses_of(chunk.eval(), ids)
    wanted = F.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten(), reduction="none")
    error = float((found.flatten() - wanted).abs().max() / wanted.abs().max())
    if case.layout != Case():
        return error
    found.sum().backward()
    wanted.sum().backward()
    # A second model of the same form holds the gradients of the first one's weights.
    grads = {name: weight.grad for name, weight in model.named_parameters()}
    theirs = gpt_chunk(model.config, config)
    load_cut([theirs], SplitExperts(LoadedWeights(grads)), model.config)
    return max(error, *map(_difference, chunk.parameters(), theirs.parameters()))


def _difference(mine: nn.Parameter, grad: Tensor) -> float:
    assert mine.grad is not None
    return float((mine.grad - grad).norm() / grad.norm())
