"""Refuse models and calls that elision would compute wrongly; each error names the reason."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.families.text_decoders import TEXT_DECODERS

_CAUSAL_LAYERS = {"full_attention", "sliding_attention"}


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


def require_tested_decoder(decoder: Any) -> None:
    """Refuse a kind of decoder that no test has compared with an oracle."""
    if decoder.config.model_type not in TEXT_DECODERS:
        raise ValueError(
            f"decoder {decoder.config.model_type!r} is not supported; tested are "
            f"{tuple(TEXT_DECODERS)}: use one of these"
        )


def require_supported_decoder(host: nn.Module, decoder: nn.Module, first: int, last: int) -> None:
    """Refuse a decoder, gated range or head that elision would compute wrongly."""
    config: Any = decoder.config
    if config._attn_implementation not in ("sdpa", "eager", "flash_attention_2"):
        raise ValueError(
            f"attn_implementation={config._attn_implementation!r} is not supported; "
            "load the model with sdpa, eager or flash_attention_2"
        )
    if not 0 <= first < last <= len(decoder.layers):
        raise ValueError(
            f"gated layers [{first}, {last}) do not fit a decoder of {len(decoder.layers)} layers; "
            "set first_layer and last_layer within it"
        )
    unknown = set(getattr(config, "layer_types", None) or ()) - _CAUSAL_LAYERS
    if unknown:
        raise ValueError(
            f"layers of type {sorted(unknown)} are not supported; use a model whose layers are all "
            f"of type {sorted(_CAUSAL_LAYERS)}"
        )
    require_plain_head(host)


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
    if (cache := kwargs.get("past_key_values")) is not None:
        raise ValueError(
            f"a call with regate_plan also has past_key_values ({type(cache).__name__}), but "
            "a plan is of whole samples, without a cache; leave it out"
        )
    if kwargs.get("return_dict") is False:
        raise ValueError(
            "return_dict=False with a regate_plan is not supported, as the output is an "
            "ElidedOutput; leave return_dict out"
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


def require_window(host: Any, plan: ElisionPlan) -> None:
    """Refuse an elided plan whose rows are as long as the decoder's sliding window, or longer."""
    config = host.get_decoder().config
    layer_types = getattr(config, "layer_types", None)
    slides = "sliding_attention" in layer_types if layer_types else True
    window = getattr(config, "sliding_window", None)
    if slides and window is not None and plan.num_tokens >= window and plan.moves_rows:
        raise ValueError(
            f"a row of {plan.num_tokens} tokens reaches the attention window of {window}: after "
            "elision the window would count kept tokens, not positions; use shorter rows"
        )
