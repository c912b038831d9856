"""Refuse models that elision would compute wrongly; each error names the reason."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from regate_ds.algorithm.executions.execution import Span
from regate_ds.families.hosts import Supported, supported

_CAUSAL_LAYERS = ("full_attention", "sliding_attention")

_USE_FSDP2 = "FSDP1 hides its parameters: use FSDP2 (fully_shard), after attach"
_WRAPPERS: dict[type, str] = {
    FullyShardedDataParallel: _USE_FSDP2,
    FSDPModule: "call attach before fully_shard",
    DistributedDataParallel: "call attach before DistributedDataParallel",
}


def require_language_model(model: nn.Module, host: Any) -> None:
    """Refuse a model without decoder and head, or one that changes inputs or logits itself."""
    name = type(host).__name__
    if hasattr(host, "gradient_accumulation_steps"):
        raise ValueError(f"{name} is an engine; attach to the model before deepspeed.initialize")
    require_unwrapped(model)
    is_host = callable(getattr(host, "get_decoder", None)) and hasattr(host, "base_model")
    if not is_host or hasattr(host, "_orig_mod"):  # what torch.compile returns
        raise ValueError(
            f"{name} is not a Hugging Face language model; attach to what from_pretrained gives, "
            "before it is compiled or wrapped"
        )
    if host.get_output_embeddings() is None:
        raise ValueError(f"{name} has no language modelling head; load it as a ...ForCausalLM")
    home = type(host).forward.__module__
    if not home.startswith("transformers.models."):
        raise ValueError(
            f"{name}.forward is defined in {home}, not in transformers.models, so elision would "
            "leave out what it does to the logits; attach to the class that it is derived from"
        )


def require_unwrapped(model: nn.Module, but: type | None = None) -> None:
    """Refuse a model around which DDP or FSDP lies: its ranks would not see what attach replaces.

    but: what may lie there by now.
    """
    for part in model.modules():
        for wrapper, way_out in _WRAPPERS.items():
            if isinstance(part, wrapper) and wrapper is not but:
                raise ValueError(f"the model is wrapped by {wrapper.__name__}; {way_out}")
    if getattr(model, "_is_fsdp_managed_module", False) and not isinstance(model, FSDPModule):
        raise ValueError(f"the model is wrapped by FullyShardedDataParallel; {_USE_FSDP2}")


def require_host(model: nn.Module, host: Any) -> Supported:
    """Return what elision needs to know of a model; refuse one that it would compute wrongly.

    ValueError in one line, before anything of the model is changed.
    """
    require_language_model(model, host)
    support = supported(host)
    config: Any = host.get_decoder().config
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager", "flash_attention_2"):
        raise ValueError(
            f"attn_implementation={implementation!r} is not supported; load the model with sdpa, "
            "eager or flash_attention_2"
        )
    if support.own_mask and implementation == "flash_attention_2":
        raise ValueError(
            f"{type(host).__name__} needs its own attention mask, which flash_attention_2 does not "
            "take; load the model with attn_implementation='sdpa' or 'eager'"
        )
    require_known_config(support, config)
    require_plain_head(host)
    require_one_device(host)
    return support


def require_one_device(host: nn.Module) -> None:
    """Refuse a model whose parts accelerate has put on several devices, or off all of them."""
    hooks = [hook for module in host.modules() for hook in _hooks_of(module)]
    devices = {str(hook.execution_device) for hook in hooks if hook.execution_device is not None}
    if any(hook.offload for hook in hooks):
        raise ValueError(
            "parts of the model are offloaded, by device_map, and have no weights but while they "
            "run; load it on one device: device_map={'': device}"
        )
    if len(devices) > 1:
        raise ValueError(
            f"the model lies on {len(devices)} devices of one process "
            f"({', '.join(sorted(devices))}) by device_map, and a plan on one; load it with "
            "device_map={'': device}, and use ZeRO-3 or FSDP2 if it does not fit"
        )


def _hooks_of(module: nn.Module) -> list[Any]:
    """Return what accelerate runs around a module."""
    hook = getattr(module, "_hf_hook", None)
    found = getattr(hook, "hooks", [hook])  # of several
    return [one for one in found if hasattr(one, "execution_device")]


def require_known_config(support: Supported, config: Any) -> None:
    """Refuse what a decoder's configuration asks for beyond what its class was tested with."""
    known = {*_CAUSAL_LAYERS, *support.recurrent}
    unknown = set(getattr(config, "layer_types", None) or ()) - known
    if unknown:
        raise ValueError(
            f"layers of type {sorted(unknown)} are not supported; use a model whose layers are all "
            f"of type {sorted(known)}"
        )
    sees_all = getattr(config, "use_bidirectional_attention", None) in (True, "all")
    if not support.own_mask and (sees_all or getattr(config, "is_causal", True) is False):
        raise ValueError(
            "is_causal=False or use_bidirectional_attention in the decoder's config makes every "
            "token see later ones, so that none can be left out; use a causal decoder"
        )
    require_no_router_loss(getattr(config, "output_router_logits", False))
    _require_own_routes(config)


def require_span(first: int, last: int, depth: int) -> None:
    """Refuse a gated range that a decoder of ``depth`` layers does not have."""
    if not 0 <= first < last <= depth:
        raise ValueError(
            f"gated layers [{first}, {last}) do not fit a decoder of {depth} layers; "
            "set first_layer and last_layer within it"
        )


def require_no_router_loss(asked: Any) -> None:
    """Refuse a call, or a configuration, that asks for the experts' auxiliary loss."""
    if asked:
        raise ValueError(
            "output_router_logits=True asks for the load-balancing loss of the experts, which the "
            "host computes from rows of all tokens and a plan would drop; set it to false"
        )


def _require_own_routes(config: Any) -> None:
    """Refuse experts that the host chooses for a token by the rows of others."""
    if config.model_type == "doge" and config.is_moe:
        raise ValueError(
            "is_moe=True: Doge's experts are chosen for a token by the rows of other tokens, so "
            "that no token can be left out; use a Doge model with is_moe=False"
        )


def require_keys_within(config: Any, span: Span | None, *, is_apart: bool = False) -> None:
    """Refuse a span of layers in which one reads the keys of another that ran on other rows.

    is_apart: whether each layer of the span has a kept set of its own.
    """
    num_sharing = getattr(config, "num_kv_shared_layers", 0) or 0
    if not num_sharing or span is None or span.part != "layer":
        return
    if is_apart:
        raise ValueError(
            f"the last {num_sharing} layers read keys of earlier ones, which execution=random_ltd "
            "would run on other rows; use execution=elide"
        )
    depth, types = config.num_hidden_layers, list(config.layer_types)
    own, sharing = types[: depth - num_sharing], set(types[depth - num_sharing :])
    source = min(len(own) - 1 - own[::-1].index(each) for each in sharing)
    if span.first > source or span.last < depth:
        raise ValueError(
            f"the last {num_sharing} layers read keys of layers from {source} on, which gated "
            f"layers [{span.first}, {span.last}) would run on other rows; set first_layer to at "
            f"most {source}, and last_layer to null"
        )


def require_plain_head(host: Any) -> None:
    """Refuse a head that does more than apply its weight and bias.

    Elision computes the head from these two alone, and only at target rows.
    """
    head = host.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ValueError(
            f"the output head is a {type(head).__name__}, not a plain Linear; leave lm_head out of "
            "quantisation, and of LoRA's target_modules and modules_to_save"
        )
    if head._forward_hooks or head._forward_pre_hooks:
        raise ValueError(
            "the output head has forward hooks, which would not see logits; remove them, or "
            "register them after attach if they only observe"
        )
