"""Rows of several samples, as collate functions join them: which positions are whose.

Trainers say where the samples of a row begin in three ways, and a batch may have several of them:
``seq_idx``, flash attention's ``cu_seq_lens_q``, and ``position_ids`` that begin again.

Shapes: B rows, T positions, R runs (samples of a row, and its padding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regate_ds.algorithm.batch import IGNORE, SampleKey, starts_segment

BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Names that transformers gives to explicit boundaries; a layer gets all of them or none."""

BOUNDS = (*BOUNDARIES, "seq_idx")
"""Inputs that tell the samples of a row apart, and which the plan makes anew of what is kept."""

_NUM_TEXT_FIRST = 4
"""Axes of ``position_ids`` with the text's positions before time, row and column."""


def read_segments(
    inputs: Mapping[str, Any], is_token_BT: Tensor, labels_BT: Tensor, num_keys: int
) -> Tensor:
    """Return which sample of its row each position belongs to, int64 [B, T]; -1 is padding.

    labels_BT: the host's, not shifted. num_keys: how many samples the batch's items are.

    ValueError if the inputs contradict each other, or tell of another number of samples.
    """
    starts = [*_starts(inputs, is_token_BT)] or [("its rows", _row_starts(is_token_BT))]
    found: dict[str, Tensor] = {}
    for name, starts_BT in starts:
        segment_BT = (starts_BT.cumsum(1) - 1).masked_fill(~is_token_BT, -1)
        found[name] = _without_padding(segment_BT, labels_BT, num_keys)
    (name, segment_BT), *others = found.items()
    for other, also_BT in others:
        if not torch.equal(segment_BT, also_BT):
            row, position = (int(one) for one in (segment_BT != also_BT).nonzero()[0])
            raise ValueError(
                f"the collated batch contradicts itself: {name} and {other} differ on whether a "
                f"sample begins at position {position} of row {row}; give one of them"
            )
    num_runs = int((segment_BT.amax(1) + 1).sum())
    if num_runs != num_keys:
        raise ValueError(_count_message(name, num_runs, num_keys, tuple(labels_BT.shape)))
    return segment_BT


def _count_message(name: str, num_runs: int, num_keys: int, shape: tuple[int, ...]) -> str:
    said = f"the collate function made {shape[0]} rows {shape} of {num_keys} samples, but"
    if num_runs < num_keys:
        return (
            f"{said} by {name} there are {num_runs}; a collate function that joins samples "
            "(padding-free, packing) has to say where they begin, by position_ids that begin again "
            "in each, cu_seq_lens_q or seq_idx"
        )
    return (
        f"{said} by {name} there are {num_runs}; give an item that holds several samples a list of "
        "their keys under 'regate_key', or one sample in each item"
    )


def _starts(inputs: Mapping[str, Any], is_token_BT: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield bool [B, T] by each input that says it: True where a sample begins."""
    rows_BT = _row_starts(is_token_BT)
    readers: dict[str, Callable[[str, Any, Tensor], Tensor]] = {
        "seq_idx": _by_number,
        "cu_seq_lens_q": _by_bounds,
        "cu_seq_lens_k": _by_bounds,
        "position_ids": partial(_by_positions, is_token_BT=is_token_BT),
    }
    for name, read in readers.items():
        if inputs.get(name) is not None:
            given = torch.as_tensor(inputs[name]).cpu()
            yield name, read(name, given, rows_BT) & is_token_BT


def _row_starts(is_token_BT: Tensor) -> Tensor:
    return starts_segment(is_token_BT.long() - 1)


def _by_number(name: str, number: Tensor, rows_BT: Tensor) -> Tensor:
    return _changes(_expanded(name, number, rows_BT), step=0, rows_BT=rows_BT)


def _by_bounds(name: str, bounds_R: Tensor, rows_BT: Tensor) -> Tensor:
    """The bounds are of the rows behind one another."""
    bounds_R = bounds_R.long()
    is_rising = bounds_R.dim() == 1 and len(bounds_R) > 1 and bool((bounds_R.diff() > 0).all())
    if not is_rising or int(bounds_R[0]) != 0 or int(bounds_R[-1]) != rows_BT.numel():
        raise ValueError(
            f"the collated batch's {name} are {bounds_R.tolist()}; give rising bounds from 0 to "
            f"the {rows_BT.numel()} positions of the rows {tuple(rows_BT.shape)}"
        )
    starts_BT = torch.zeros(rows_BT.numel(), dtype=torch.bool)
    starts_BT[bounds_R[:-1]] = True
    starts_BT = starts_BT.view(rows_BT.shape)
    if not bool(starts_BT[rows_BT].all()):
        raise ValueError(
            f"the collated batch's {name} let a sample reach from one row into the next; a sample "
            "ends with its row"
        )
    return starts_BT


def _by_positions(name: str, position: Tensor, rows_BT: Tensor, is_token_BT: Tensor) -> Tensor:
    if position.dim() == 3 and len(position) == _NUM_TEXT_FIRST:
        position = position[0]
    elif position.dim() == 3 and position.shape[1:] == rows_BT.shape:
        # An image moves them in steps of its own, but only a sample's first token is at the origin.
        starts_BT = (position == 0).all(0) & ~rows_BT & is_token_BT
        if bool(starts_BT.any()):
            row, place = (int(one) for one in starts_BT.nonzero()[0])
            raise ValueError(
                f"{name} {tuple(position.shape)} begin again at position {place} of row {row}, "
                "which the model would not take for another sample; give [4, rows, tokens], the "
                "text's positions first"
            )
        return rows_BT
    return _changes(_expanded(name, position, rows_BT), step=1, rows_BT=rows_BT)


def _changes(number_BT: Tensor, *, step: int, rows_BT: Tensor) -> Tensor:
    """Mark where a row begins, or a number is not the one before plus ``step``."""
    changes_BT = torch.zeros_like(rows_BT)
    changes_BT[:, 1:] = number_BT.diff(dim=1) != step
    return changes_BT | rows_BT


def _expanded(name: str, x: Tensor, rows_BT: Tensor) -> Tensor:
    if x.dim() != 2 or x.shape[1] != rows_BT.shape[1] or x.shape[0] not in (1, len(rows_BT)):
        raise ValueError(
            f"the collated batch has {name} {tuple(x.shape)}, which elision cannot read; give "
            f"{tuple(rows_BT.shape)}, one for each position of the rows"
        )
    return x.expand(rows_BT.shape)


def _without_padding(segment_BT: Tensor, labels_BT: Tensor, num_keys: int) -> Tensor:
    """Take runs at the ends of rows for padding: no label in them, and too many of them.

    What a sample without labels sees changes no loss.
    """
    last_B = segment_BT.amax(1)
    used_B = segment_BT.masked_fill(labels_BT == IGNORE, 0).amax(1).clamp(min=0)
    too_many, spare = int((last_B + 1).sum()) - num_keys, int((last_B - used_B).sum())
    if too_many <= 0 or too_many > spare or (too_many < spare and len(last_B) > 1):
        return segment_BT
    end_B = used_B if too_many == spare else last_B - too_many
    return segment_BT.masked_fill(segment_BT > end_B[:, None], -1)


def require_order(
    items: Sequence[Mapping[str, Any]], inputs: Mapping[str, Any], segment_BT: Tensor
) -> None:
    """Refuse rows whose samples are not the items, in their order: ValueError.

    Items without token ids cannot be compared. Rows of one sample each may be cut, or have image
    tokens that the items lack: there a row that is another item is refused.
    """
    ids_BT = inputs.get("input_ids")
    if not isinstance(ids_BT, Tensor) or ids_BT.shape != segment_BT.shape:
        return
    if not all(_has_ids(item) for item in items):
        return
    ids_BT = ids_BT.cpu()
    try:
        wanted = [torch.as_tensor(item["input_ids"]).flatten() for item in items]
    except (TypeError, ValueError):
        return  # Samples of several lengths in one item, or texts.
    if not bool((segment_BT > 0).any()):
        _require_own_rows([row[of >= 0] for row, of in zip(ids_BT, segment_BT)], wanted)
    elif not torch.equal(ids_BT[segment_BT >= 0], torch.cat(wanted)):
        raise ValueError(
            f"the collate function made rows {tuple(ids_BT.shape)} whose tokens are not those of "
            "the items in their order; elision tells joined samples by their order: keep it"
        )


def _has_ids(item: Mapping[str, Any]) -> bool:
    return isinstance(item.get("input_ids"), Tensor | list | np.ndarray)


def _require_own_rows(rows: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for number, (row, own) in enumerate(zip(rows, wanted)):
        if not _begins(own, row):
            for other, ids in enumerate(wanted):
                if _begins(ids, row):
                    raise ValueError(
                        f"row {number} of the collated batch has the tokens of item {other}; "
                        "elision tells samples by their order: let the collate function keep it, "
                        "and not sort them by length"
                    )


def _begins(ids: Tensor, row: Tensor) -> bool:
    return 0 < len(row) <= len(ids) and torch.equal(ids[: len(row)].to(row.dtype), row)


def within_samples(labels_BT: Tensor, segment_BT: Tensor) -> Tensor:
    """Return shifted labels without those at the last position of a sample: they are the next
    sample's first token."""
    crosses_BT = starts_segment(segment_BT).roll(-1, 1)
    return labels_BT.masked_fill(crosses_BT, IGNORE)


def number_in_samples(image_BT: Tensor, segment_BT: Tensor) -> Tensor:
    """Number images from 0 in each sample, where they are numbered from 0 in each row."""
    width = int(segment_BT.max()) + 1
    most = int(image_BT.max()) + 1
    slot_BT = segment_BT.clamp(min=0)
    seen_BT = image_BT.masked_fill(image_BT < 0, most)
    first_BS = torch.full((len(image_BT), width), most)
    first_BS.scatter_reduce_(1, slot_BT, seen_BT, "amin")
    return torch.where(image_BT >= 0, image_BT - first_BS.gather(1, slot_BT), -1)


def keys_of_rows(
    keys: Sequence[Sequence[SampleKey]], segment_BT: Tensor
) -> tuple[tuple[SampleKey, ...], ...]:
    """Give each row the keys of its samples; the items' keys are in reading order."""
    rest = [key for each in keys for key in each]
    rows: list[tuple[SampleKey, ...]] = []
    for count in (segment_BT.amax(1) + 1).tolist():
        rows.append(tuple(rest[:count]))
        rest = rest[count:]
    return tuple(rows)
