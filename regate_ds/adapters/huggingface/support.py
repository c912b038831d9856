"""Refuse models and calls that elision would compute wrongly; each error names the reason."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.families.hosts import Supported, supported
from regate_ds.families.table import find_family

_CAUSAL_LAYERS = ("full_attention", "sliding_attention")


def require_language_model(model: nn.Module, host: Any) -> None:
    """Refuse a model without decoder and head, or one that changes inputs or logits itself."""
    name = type(host).__name__
    if hasattr(host, "gradient_accumulation_steps"):
        raise ValueError(f"{name} is an engine; attach to the model before deepspeed.initialize")
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(
            f"{type(config).__name__} puts tokens of its own before the samples, which a plan does "
            "not count; use LoRA, or train all weights"
        )
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
    known = {*_CAUSAL_LAYERS, *support.recurrent}
    unknown = set(getattr(config, "layer_types", None) or ()) - known
    if unknown:
        raise ValueError(
            f"layers of type {sorted(unknown)} are not supported; use a model whose layers are all "
            f"of type {sorted(known)}"
        )
    _require_no_router_loss(getattr(config, "output_router_logits", False))
    _require_own_routes(config)
    require_plain_head(host)
    return support


def require_span(config: Any, first: int, last: int, depth: int) -> None:
    """Refuse a gated range that a decoder of ``depth`` layers does not have or cannot be cut in."""
    if not 0 <= first < last <= depth:
        raise ValueError(
            f"gated layers [{first}, {last}) do not fit a decoder of {depth} layers; "
            "set first_layer and last_layer within it"
        )
    _require_keys_within(config, first, last)


def _require_no_router_loss(asked: Any) -> None:
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


def _require_keys_within(config: Any, first: int, last: int) -> None:
    """Refuse a gated range in which a layer reads the keys of one that ran on other rows."""
    num_sharing = getattr(config, "num_kv_shared_layers", 0) or 0
    if not num_sharing:
        return
    depth, types = config.num_hidden_layers, list(config.layer_types)
    own, sharing = types[: depth - num_sharing], set(types[depth - num_sharing :])
    source = min(len(own) - 1 - own[::-1].index(each) for each in sharing)
    if first > source or last < depth:
        raise ValueError(
            f"the last {num_sharing} layers read keys of layers from {source} on, which gated "
            f"layers [{first}, {last}) would run on other rows; set first_layer to {source} or "
            "less, and last_layer to null"
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


def require_plain_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse arguments of a model call that a plan contradicts."""
    if args or kwargs.get("labels") is not None:
        found = f"{len(args)} positional inputs" if args else "labels"
        raise ValueError(
            f"a call with regate_plan also has {found}; give inputs by keyword and no labels: the "
            "plan has them"
        )
    for name in ("past_key_values", "cache"):
        if (cache := kwargs.get(name)) is not None:
            raise ValueError(
                f"a call with regate_plan also has {name} ({type(cache).__name__}), but "
                "a plan is of whole samples, without a cache; leave it out"
            )
    _require_no_router_loss(kwargs.get("output_router_logits"))
    if kwargs.get("return_dict") is False:
        raise ValueError(
            "return_dict=False with a regate_plan is not supported, as the output is an "
            "ElidedOutput; leave return_dict out"
        )


def require_marks(host: Any, kwargs: dict[str, Any], marks: tuple[str, ...]) -> None:
    """Refuse images without the inputs that mark them, where the host would not notice."""
    has_images = any(
        name.startswith("pixel_values") and x is not None for name, x in kwargs.items()
    )
    missing = [name for name in marks if kwargs.get(name) is None]
    if has_images and missing and kwargs.get("position_ids") is None:
        raise ValueError(
            f"images are given without {missing[0]!r}: {type(host).__name__} would take their "
            "tokens for text, without an error; give all that the model's processor returns"
        )


def require_rows(hidden_BTH: Tensor, plan: ElisionPlan) -> None:
    """Refuse a plan of other rows than the decoder reads, such as another micro-batch's plan."""
    found, planned = tuple(hidden_BTH.shape[:2]), (len(plan.kept_BK), plan.num_tokens)
    if found != planned:
        raise ValueError(
            f"the decoder reads {found[0]} rows of {found[1]} tokens, the plan is of {planned[0]} "
            f"rows of {planned[1]}; give each micro-batch its own plan, and make labels as long as "
            "the rows that the decoder reads"
        )


def require_samples_apart(host: Any, plan: ElisionPlan, position_ids: Any, *, packs: bool) -> None:
    """Refuse packed rows where the host lets the samples of a row see each other."""
    if not plan.is_packed:
        return
    name, family = type(host).__name__, find_family(host)
    if not packs:
        raise ValueError(
            f"a row holds several samples, but {name} does not keep them apart; "
            "give each sample a row of its own (data.pack_length=null)"
        )
    several_axes = family is not None and family.num_position_axes > 1
    if several_axes and isinstance(position_ids, Tensor) and position_ids.dim() == 2:
        raise ValueError(
            f"a row holds several samples, but position_ids are {tuple(position_ids.shape)}; "
            f"{name} keeps samples apart by [4, rows, tokens], text positions first: give these"
        )


def require_passed_through(
    host: Any, hidden: Tensor, num_rows: int, num_seen: int, num_layers: int
) -> None:
    """Refuse a pass whose layers were not all given the plan, or whose output is of other rows."""
    if num_seen != num_layers:
        raise ValueError(
            f"{num_seen} of {num_layers} decoder layers of {type(host).__name__} were given the "
            "plan: the others ran without it; use a model of docs/models.md"
        )
    if hidden.shape[-2] != num_rows:
        raise ValueError(
            f"the decoder of {type(host).__name__} returned rows of {hidden.shape[-2]}, the plan "
            f"has {num_rows}; use a model of docs/models.md"
        )


def window_of(host: Any) -> int | None:
    """Return how many positions some layer's attention reaches back; None if all."""
    config = host.get_decoder().config
    types = getattr(config, "layer_types", None)
    found = []
    if types is None or "sliding_attention" in types:
        found.append(getattr(config, "sliding_window", None))
    if types is not None and "chunked_attention" in types:
        found.append(getattr(config, "attention_chunk_size", None))
    return min((size for size in found if size is not None), default=None)


def require_window(implementation: str, num_tokens: int, window: int | None) -> None:
    """Refuse rows as long as the window, or longer, where a kernel counts it in rows."""
    if implementation == "flash_attention_2":
        raise ValueError(
            f"a row of {num_tokens} tokens reaches the attention window of {window}: after "
            "elision flash_attention_2 would count kept tokens, not positions; use shorter rows, "
            "or load the model with attn_implementation='sdpa'"
        )
