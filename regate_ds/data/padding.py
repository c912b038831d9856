"""Which positions of a user's micro-batch are tokens, and what their masks and labels must be.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regate_ds.algorithm.batch import IGNORE


def labels_of(inputs: object) -> Tensor:
    """Return int64 [B, T], the labels of what a collate function returned, in CPU memory.

    ValueError if it has none, or such as no loss takes.
    """
    if not isinstance(inputs, Mapping):
        raise ValueError(
            f"the collate function returned a {type(inputs).__name__}; make it return a dict of "
            "what the model takes by name, its labels among them"
        )
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
        found = type(labels).__name__
        if isinstance(labels, Tensor):
            found = f"{labels.dtype} {tuple(labels.shape)}"
        raise ValueError(
            f"the collated batch has labels {found}, not a tensor of whole numbers [rows, tokens]; "
            "make the collate function return such labels, which elision follows"
        )
    labels_BT = labels.cpu().long()
    _require_known(labels_BT)
    ids = inputs.get("input_ids")
    if isinstance(ids, Tensor) and ids.shape == labels.shape:
        _require_unshifted(labels_BT, ids.cpu())
    return labels_BT


def _require_known(labels_BT: Tensor) -> None:
    is_wrong_BT = (labels_BT < 0) & (labels_BT != IGNORE)
    if bool(is_wrong_BT.any()):
        row, position = (int(one) for one in is_wrong_BT.nonzero()[0])
        raise ValueError(
            f"the label at position {position} of row {row} is {int(labels_BT[row, position])}; a "
            f"label is a token, or {IGNORE} where there is nothing to learn"
        )


def _require_unshifted(labels_BT: Tensor, ids_BT: Tensor) -> None:
    """Refuse labels that all are the next token, as a collate function gives that shifts them."""
    is_label_BT = labels_BT != IGNORE
    is_other_BT = is_label_BT & (labels_BT != ids_BT)
    is_next_BT = labels_BT[:, :-1] == ids_BT[:, 1:]
    # One label may be the next token by chance.
    if int(is_other_BT.sum()) < 2 or not bool((is_next_BT | ~is_label_BT[:, :-1]).all()):
        return
    row, position = (int(one) for one in is_other_BT.nonzero()[0])
    raise ValueError(
        f"the labels are shifted: that at position {position} of row {row} is the token at "
        f"{position + 1}; give them as models of transformers take them, the token itself at each "
        f"position to learn and {IGNORE} elsewhere"
    )


def padding_of(inputs: Mapping[str, Any], labels_BT: Tensor) -> Tensor:
    """Return bool [B, T], True at tokens, by the batch's ``attention_mask`` if it has one.

    ValueError for a mask that says something else than which positions at the end of each row are
    padding.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.ones_like(labels_BT, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != labels_BT.shape:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"the collated batch has an attention_mask {found} for labels "
            f"{tuple(labels_BT.shape)}; elision reads padding off a mask [rows, tokens], and the "
            "samples of a row off position_ids that begin again in each: give these"
        )
    mask_BT = mask.cpu()
    _require_zeros_and_ones(mask_BT)
    is_token_BT = mask_BT.bool()
    _require_right_padding(is_token_BT, labels_BT, inputs.get("input_ids"))
    return is_token_BT


def _require_zeros_and_ones(mask_BT: Tensor) -> None:
    if bool((mask_BT > 1).any()):
        raise ValueError(
            f"the collated batch's attention_mask numbers the samples of a row (up to "
            f"{int(mask_BT.max())}), which elision would not read; leave the mask out, and give "
            "position_ids that begin again in each sample"
        )
    is_other_BT = (mask_BT != 0) & (mask_BT != 1)
    if bool(is_other_BT.any()):
        raise ValueError(
            f"the collated batch's attention_mask holds {mask_BT[is_other_BT][0].item()}; give the "
            "mask that says which positions are tokens (1) and which padding (0), not one that is "
            "added to scores"
        )


def _require_right_padding(is_token_BT: Tensor, labels_BT: Tensor, ids_BT: Any) -> None:
    """Refuse, by ValueError, a row with masked positions before or among its tokens."""
    rises_BT = is_token_BT[:, 1:] & ~is_token_BT[:, :-1]
    wrong_B = rises_BT.any(1) | ~is_token_BT.any(1)
    if not bool(wrong_B.any()):
        return
    row = int(wrong_B.nonzero()[0, 0])
    is_label_T = labels_BT[row] != IGNORE
    if bool(is_label_T.any()) and not bool((is_label_T & is_token_BT[row]).any()):
        raise ValueError(
            f"row {row}: the attention_mask is 0 at all positions that have labels; it must be 1 "
            "at tokens and 0 at padding: is it the wrong way round?"
        )
    if not bool(is_token_BT[row].any()):
        raise ValueError(f"row {row} has no token by its attention_mask; leave empty samples out")
    position = int(rises_BT[row].nonzero()[0, 0])
    if not bool(is_token_BT[row, : position + 1].any()):
        raise ValueError(f"row {row} has padding before tokens; set padding_side='right'")
    token = f" (id {int(ids_BT[row, position])})" if isinstance(ids_BT, Tensor) else ""
    raise ValueError(
        f"row {row}: the attention_mask leaves out position {position}{token} among its tokens; "
        "where the padding is also the end of a turn, make the mask from the samples' lengths"
    )
