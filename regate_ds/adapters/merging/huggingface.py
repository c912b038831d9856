"""Merged steps inside a Hugging Face model: its decoder reads patches in place of tokens.

What the decoder's own ``forward`` is given, be it ids or the embeddings into which the host has put
images, becomes one row for each patch, with the patch's number as its position. All that follows is
the host's own, at fewer rows: masks, windows, rotary positions, layers.

Shapes: B rows, T positions, K slots, H hidden, U slots that predict something.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import Tensor

from regate_ds.adapters.attachment import Attachment
from regate_ds.adapters.huggingface.calls import require_rows
from regate_ds.adapters.huggingface.empty_image import has_tower
from regate_ds.adapters.huggingface.head import HeadGate, head_forward
from regate_ds.adapters.huggingface.layer_inputs import ForwardPass
from regate_ds.algorithm.executions.merge import mean_of_members
from regate_ds.algorithm.executions.patch_loss import summed_patch_loss
from regate_ds.algorithm.loss import token_losses
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.families.hosts import Supported
from regate_ds.families.table import find_family

_OFF = "set merge.steps=0, or use another model"


def attach_merging(attachment: Attachment, host: Any, gate: HeadGate) -> None:
    """Make decoder and head follow plans with patches; others pass through."""
    attachment.rebind_forward(host.get_decoder(), _decoder_forward)
    attachment.rebind_forward(host.get_output_embeddings(), _head_forward, gate=gate)


def require_mergeable(host: Any, support: Supported, num_virtual: int) -> None:
    """Refuse, by ValueError, a model whose tokens have more than an embedding and a number."""
    name, family, decoder = type(host).__name__, find_family(host), host.get_decoder()
    names = signature(decoder.forward).parameters
    faults = {
        "gives its tokens several position numbers": (
            family is not None and family.num_position_axes > 1
        ),
        "makes masks of its own outside the decoder": support.own_mask,
        f"gives its layers {', '.join(support.token_inputs)} for each token": bool(
            support.token_inputs
        ),
        "carries a state from token to token": bool(support.recurrent),
        "adds features of images between its layers": support.deepstack,
        "has virtual tokens before its rows": num_virtual > 0,
        "has a decoder without inputs_embeds and position_ids": not (
            {"inputs_embeds", "position_ids"} <= names.keys()
        ),
        "does not tell the token that stands for images": has_tower(host)
        and getattr(host.config, "image_token_id", None) is None,
    }
    for fault in (fault for fault, has in faults.items() if has):
        raise ValueError(f"merged steps: {name} {fault}, so that tokens cannot be one; {_OFF}")


def _decoder_forward(
    host_forward: Any, *args: Any, regate_plan: ForwardPass | None = None, **kwargs: Any
) -> Any:
    if regate_plan is None:
        return host_forward(*args, **kwargs)
    patches = regate_plan.plan.patches
    if patches is None:
        return host_forward(*args, regate_plan=regate_plan, **kwargs)
    given = signature(host_forward).bind_partial(*args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    embedded_BTH = given.get("inputs_embeds")
    if embedded_BTH is None:
        embedded_BTH = host_forward.__self__.get_input_embeddings()(given["input_ids"])
    require_rows(embedded_BTH, regate_plan.plan, patches.row_length)
    given |= {
        "input_ids": None,
        "inputs_embeds": mean_of_members(embedded_BTH, regate_plan.plan),
        "position_ids": patches.place_BK,
        # Padding lies at the end of a row, where no token sees it.
        "attention_mask": None,
    }
    return host_forward(regate_plan=regate_plan, **given)


def _head_forward(
    host_forward: Any, hidden: Tensor, *, gate: HeadGate, regate_plan: ElisionPlan | None = None
) -> Any:
    """Return what ``head_forward`` does; hidden: of a plan with patches, the rows that predict."""
    if regate_plan is None or (patches := regate_plan.patches) is None:
        return head_forward(host_forward, hidden, gate=gate, regate_plan=regate_plan)
    head, targets_L = host_forward.__self__, regate_plan.targets_L
    if gate.own_loss:
        hidden_LH = hidden.index_select(0, patches.cell_L // patches.size)
        losses_L, entropy_L = token_losses(
            hidden_LH,
            head.weight,
            head.bias,
            targets_L,
            gate.change,
            with_entropy=gate.with_entropy,
        )
        return losses_L.sum(), losses_L, entropy_L, None, None
    top1_L = targets_L.bool() if gate.with_top1 else None
    found = summed_patch_loss(
        hidden,
        head.weight,
        head.bias,
        targets_L,
        patches,
        gate.change,
        with_entropy=gate.with_entropy,
        top1_L=top1_L,
    )
    return *found, top1_L, None
