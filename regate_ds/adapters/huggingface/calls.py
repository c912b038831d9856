"""Refuse calls with a plan that elision would compute wrongly; each error names the reason."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from regate_ds.adapters.huggingface.attention import attention_of
from regate_ds.adapters.huggingface.support import require_no_router_loss
from regate_ds.adapters.huggingface.tower_calls import kinds_of
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.families.hosts import Supported
from regate_ds.families.table import find_family

_MASKED = ("sdpa", "eager")


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
    require_no_router_loss(kwargs.get("output_router_logits"))
    if kwargs.get("return_dict") is False:
        raise ValueError(
            "return_dict=False with a regate_plan is not supported, as the output is an "
            "ElidedOutput; leave return_dict out"
        )


def require_marks(host: Any, kwargs: dict[str, Any], marks: tuple[str, ...]) -> None:
    """Refuse images without the inputs that mark them, where the host would not notice."""
    missing = [name for name in marks if kwargs.get(name) is None]
    if missing and any(k.startswith("pixel_values") and kwargs[k] is not None for k in kwargs):
        raise ValueError(
            f"images are given without {missing[0]!r}: {type(host).__name__} would take their "
            "tokens for text, without an error; give all that the model's processor returns"
        )


def require_rows(hidden_BTH: Tensor, plan: ElisionPlan, row_length: int | None = None) -> None:
    """Refuse a plan of other rows than the decoder reads, such as another micro-batch's plan.

    row_length: where it is not the number of the plan's tokens, as before tokens are merged.
    """
    found = tuple(hidden_BTH.shape[:2])
    planned = len(plan.kept_BK), plan.num_tokens if row_length is None else row_length
    if found != planned:
        raise ValueError(
            f"the decoder reads {found[0]} rows of {found[1]} tokens, the plan is of {planned[0]} "
            f"rows of {planned[1]}; give each micro-batch its own plan, and make labels as long as "
            "the rows that the decoder reads"
        )


def require_samples_apart(
    host: Any, plan: ElisionPlan, kwargs: dict[str, Any], support: Supported
) -> None:
    """Refuse packed rows where the host lets the samples of a row see each other, and bounds of
    samples that the plan does not know."""
    bounds = kwargs.get("cu_seq_lens_q")
    if not plan.is_packed:
        if bounds is not None and len(bounds) - 1 > len(plan.kept_BK):
            raise ValueError(
                f"the call has cu_seq_lens_q of {len(bounds) - 1} samples, the plan has one in "
                f"each of {len(plan.kept_BK)} rows; let the collate function return them, so that "
                "the plan is of these samples"
            )
        return
    name, family = type(host).__name__, find_family(host)
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if support.packs == "none" or (support.packs == "text" and kinds_of(kwargs)):
        raise ValueError(
            f"a row holds several samples, but {name} {_fault(support)}; give each sample a row of "
            "its own (data.pack_length=null)"
        )
    # Under flash_attention_2 the plan's own boundaries take the mask's place, in every layer.
    has_mask = isinstance(mask, Tensor) and mask.dim() == 2 and attention_of(host) in _MASKED
    if positions is None or has_mask:
        found = "no position_ids" if positions is None else "an attention_mask [rows, tokens]"
        raise ValueError(
            f"a row holds several samples, but the call has {found}: {name} then lets them see "
            "each other; give position_ids that restart in each sample, and no such mask"
        )
    num_axes = 1 if family is None else family.num_position_axes
    if num_axes > 1 and (positions.dim() != 3 or len(positions) != 1 + num_axes):
        raise ValueError(
            f"a row holds several samples, but position_ids are {tuple(positions.shape)}; "
            f"{name} keeps samples apart by [{1 + num_axes}, rows, tokens], text positions first: "
            "give these"
        )


def _fault(support: Supported) -> str:
    if support.packs == "text":
        return "misplaces their images in its masks"
    if support.recurrent:
        return "has layers that carry a state from one to the next"
    return "lets them see each other"


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
    slides = types is None or "sliding_attention" in types
    return getattr(config, "sliding_window", None) if slides else None


def require_window(implementation: str, num_tokens: int, window: int | None) -> None:
    """Refuse rows as long as the window, or longer, where a kernel counts it in rows."""
    if implementation == "flash_attention_2":
        raise ValueError(
            f"a row of {num_tokens} tokens reaches the attention window of {window}: after "
            "elision flash_attention_2 would count kept tokens, not positions; use shorter rows, "
            "or load the model with attn_implementation='sdpa'"
        )
