"""Let Megatron-Bridge be imported and run on CPUs.

Bridge imports packages that are built for CUDA: what it asks of them by name is stood in for here,
and Transformer Engine's layers are replaced by Megatron-core's own. Tested with 0.6.2, installed
without its dependencies.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import spawn
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from regate_ds.adapters.megatron_on_cpu.modules import Attention, Norm


def install_for_bridge() -> None:
    """Import Bridge, with stand-ins for CUDA packages, and make its models build their layers
    without Transformer Engine. The shim must be installed before; does nothing without Bridge.
    """
    if importlib.util.find_spec("megatron.bridge") is None:
        return
    resiliency = _module("nvidia_resiliency_ext", __version__="0", __path__=[])
    inprocess = _module("nvidia_resiliency_ext.inprocess", CallWrapper=type("CallWrapper", (), {}))
    resiliency.inprocess = inprocess
    sys.modules |= {module.__name__: module for module in (resiliency, inprocess)}
    # One file asks for Transformer Engine without an "if". Megatron itself must not find it.
    importlib.import_module("megatron.training")
    with _named_transformer_engine():
        importlib.import_module("megatron.bridge.peft.lora_layers")
    for name in ("range_push", "range_pop"):
        setattr(torch.cuda.nvtx, name, lambda *_, **__: None)
    _replace_layers()
    _replace_checks()


def _replace_checks() -> None:
    """Let Bridge's setup go on without a device, and without a compiler."""
    from megatron.bridge.training import initialize, setup

    setup.initialize_megatron = partial(setup.initialize_megatron, allow_no_cuda=True)
    # The wheel has these compiled, and has no makefile.
    initialize.compile_helpers = lambda: None
    # A process that is spawned would first import the script, without these stand-ins.
    prepared = spawn.get_preparation_data
    spawn.get_preparation_data = lambda name: _without_script(prepared(name))


def _without_script(preparation: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in preparation.items() if not k.startswith("init_main")}


def local_spec(config: Any) -> Any:
    """Return a layer spec of Megatron-core's own layers, with the attention of this folder."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    parts = spec.submodules
    attention = parts.self_attention.submodules
    attention.core_attention = Attention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = _AnyNorm
    parts.input_layernorm = parts.pre_mlp_layernorm = _AnyNorm
    return spec


class _AnyNorm:
    """Makes the norm that a model asks for; of torch's own, none supports sequence parallelism."""

    def __new__(cls, config: Any, hidden_size: int, **options: Any) -> Any:
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

        made = Norm if config.normalization == "RMSNorm" else WrappedTorchNorm
        return made(config, hidden_size, **options)


def _replace_layers() -> None:
    """Give the default recipe's spec, and the Qwen3-VL modules, layers that run on CPUs."""
    from megatron.bridge.models import gpt_provider
    from megatron.bridge.models.qwen_vl import qwen3_vl_provider
    from megatron.bridge.models.qwen_vl.modelling_qwen3_vl import model
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import transformer_block

    def vision_spec() -> Any:
        spec = get_vit_layer_with_local_spec()
        parts = spec.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = _AnyNorm
        parts.self_attention.submodules.core_attention = Attention
        return spec

    def language_spec(*, num_experts: int | None, qk_layernorm: bool, **_: Any) -> Any:
        asked = SimpleNamespace(
            num_moe_experts=num_experts, qk_layernorm=qk_layernorm, normalization="RMSNorm"
        )
        return local_spec(asked)

    transformer_block.LayerNormImpl = _AnyNorm
    gpt_provider.transformer_engine_layer_spec = local_spec
    qwen3_vl_provider.get_gpt_layer_with_transformer_engine_spec = language_spec
    model.get_vit_layer_with_transformer_engine_spec = vision_spec
    model.TENorm = _AnyNorm
    model.TEColumnParallelLinear = ColumnParallelLinear
    model.TERowParallelLinear = RowParallelLinear


@contextmanager
def _named_transformer_engine() -> Iterator[None]:
    """Have modules of Transformer Engine's names, with the classes that are only compared with."""
    names = ("Linear", "LayerNormLinear", "GroupedLinear")
    classes: dict[str, Any] = {name: type(name, (), {}) for name in names}
    ops = SimpleNamespace(Sequential=type("Sequential", (), {}))
    pytorch = _module("transformer_engine.pytorch", ops=ops, **classes)
    engine = _module("transformer_engine", pytorch=pytorch, __path__=[])
    sys.modules |= {module.__name__: module for module in (engine, pytorch)}
    try:
        yield
    finally:
        for module in (engine, pytorch):
            del sys.modules[module.__name__]


def _module(name: str, **values: Any) -> Any:
    module = ModuleType(name)
    vars(module).update(values)
    return module
