"""What the method needs to know about a micro-batch: its samples, and which tokens may be elided.

Shapes: B rows, T positions of a row, N label positions of the whole micro-batch in reading order
(row by row, left to right).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that predicts no answer token."""

ABSENT, ALWAYS, ELIDABLE, IMAGE = 0, 1, 2, 3
"""Kinds of position. ABSENT: padding. ALWAYS: prompt and each sample's first position. ELIDABLE:
positions that predict an answer token. IMAGE: the other positions of an image."""

SampleKey = tuple[str, int]
"""Name of the data set and number of the record: the same in every epoch."""


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch in CPU memory: shifted labels, named samples, marked padding.

    What is made of its fields is made once, so nobody writes to its tensors.
    """

    keys: tuple[tuple[SampleKey, ...], ...]
    """Keys of the samples in each row, in reading order (one, unless rows are packed)."""

    segment_BT: Tensor
    """int64: which sample of its row a position belongs to; -1 is padding, at the end of a row, or
    of each sample where the host fills samples up."""

    labels_BT: Tensor
    """int64: the token at t+1 where it belongs to an answer, else IGNORE. Already shifted."""

    image_BT: Tensor | None = None
    """int64: the number of the image in its sample, -1 where no image is; None if not known."""

    def __post_init__(self) -> None:
        if self.segment_BT.shape != self.labels_BT.shape or self.labels_BT.dim() != 2:
            raise ValueError(
                f"segments {tuple(self.segment_BT.shape)} and labels {tuple(self.labels_BT.shape)} "
                "differ in shape; give both the same shape [B, T]"
            )
        if len(self.keys) != self.labels_BT.shape[0]:
            raise ValueError(
                f"{len(self.keys)} rows of keys for {self.labels_BT.shape[0]} rows of labels; "
                "give one tuple of keys for each row"
            )
        num_keys_B = torch.tensor([len(row) for row in self.keys])
        num_segments_B = self.segment_BT.amax(dim=1) + 1
        if not torch.equal(num_segments_B, num_keys_B):
            row = int((num_segments_B != num_keys_B).nonzero()[0])
            raise ValueError(
                f"row {row} has {int(num_segments_B[row])} segments, but {int(num_keys_B[row])} "
                "keys; give each row exactly one key for each of its segments"
            )
        if self.image_BT is not None:
            _require_image_numbers(self.image_BT, self.labels_BT)
        labelled_padding = ((self.labels_BT != IGNORE) & (self.segment_BT < 0)).nonzero()
        if len(labelled_padding):
            row, position = (int(index) for index in labelled_padding[0])
            raise ValueError(
                f"a padding position has a label: position {position} of row {row}; set the labels "
                f"of padding to {IGNORE}"
            )

    @cached_property
    def is_label_BT(self) -> Tensor:
        return self.labels_BT != IGNORE

    @cached_property
    def kind_BT(self) -> Tensor:
        """ABSENT, ALWAYS, ELIDABLE or IMAGE for every position."""
        kind_BT = torch.full_like(self.labels_BT, ALWAYS)
        if self.image_BT is not None:
            kind_BT = kind_BT.masked_fill(self.image_BT >= 0, IMAGE)
        kind_BT = kind_BT.masked_fill(self.is_label_BT, ELIDABLE)
        kind_BT = kind_BT.masked_fill(starts_segment(self.segment_BT), ALWAYS)
        return kind_BT.masked_fill(self.segment_BT < 0, ABSENT)

    @cached_property
    def sample_BT(self) -> Tensor:
        """Number of each position's sample, counted through the micro-batch; -1 is padding."""
        first_B = torch.tensor([0] + [len(row) for row in self.keys[:-1]]).cumsum(0)
        return torch.where(self.segment_BT < 0, -1, self.segment_BT + first_B[:, None])

    @cached_property
    def flat_keys(self) -> list[SampleKey]:
        """Keys of all samples in the order in which ``sample_BT`` counts them."""
        return [key for row in self.keys for key in row]

    @cached_property
    def num_labels_per_sample(self) -> list[int]:
        return [int(n) for n in self._count(self.is_label_BT)]

    @property
    def num_labels(self) -> int:
        return sum(self.num_labels_per_sample)

    @cached_property
    def num_elidable_S(self) -> Tensor:
        """int64: elidable label positions of each sample."""
        return self._count(self.kind_BT == ELIDABLE)

    def _count(self, among_BT: Tensor) -> Tensor:
        """Return how many of the marked positions, none of them padding, each sample has."""
        others = len(self.flat_keys)
        sample_BT = self.sample_BT.masked_fill(~among_BT, others)
        return torch.bincount(sample_BT.reshape(-1), minlength=others + 1)[:others]

    def at_labels(self, values_N: Tensor, *, empty: float = 0.0) -> Tensor:
        """Spread one value for each label position over [B, T], with ``empty`` elsewhere."""
        values_BT = values_N.new_full(self.labels_BT.shape, empty)
        return values_BT.masked_scatter_(self.is_label_BT, values_N)


def _require_image_numbers(image_BT: Tensor, labels_BT: Tensor) -> None:
    """Refuse, by ValueError, what numbers no images: a mask, say."""
    if image_BT.shape != labels_BT.shape:
        raise ValueError(
            f"image_BT {tuple(image_BT.shape)} and labels {tuple(labels_BT.shape)} differ in "
            "shape; give both the same shape [B, T]"
        )
    if image_BT.dtype != torch.int64 or bool((image_BT >= 1 << 31).any()):
        raise ValueError(
            f"image_BT is {image_BT.dtype}, up to {image_BT.max().item()}; give the number of each "
            "position's image in its sample, from 0, as int64, and -1 where there is none"
        )


def starts_segment(segment_BT: Tensor) -> Tensor:
    """Mark [B, T] the first position of every sample."""
    previous_BT = torch.roll(segment_BT, 1, dims=1)
    previous_BT[:, 0] = -1
    return (segment_BT >= 0) & (segment_BT != previous_BT)


def number_runs(is_image_BT: Tensor) -> Tensor:
    """Number the runs of True in each row of [..., T] from 0; -1 elsewhere."""
    before_BT = torch.nn.functional.pad(is_image_BT[..., :-1], (1, 0))
    number_BT = (is_image_BT & ~before_BT).long().cumsum(-1) - 1
    return number_BT.masked_fill(~is_image_BT, -1)


def number_images(is_image_BT: Tensor, lengths: Sequence[int]) -> Tensor:
    """Number the images of each row from 0, as ``number_runs``, where they may touch.

    lengths: the tokens of each image of the micro-batch, in reading order.

    ValueError if they do not add up to the image positions, or an image crosses a row's end.
    """
    num_positions = int(is_image_BT.sum())
    if sum(lengths) != num_positions:
        raise ValueError(
            f"the batch has {num_positions} image positions, but its images have {sum(lengths)} "
            "tokens; give each image as many placeholders as it has tokens"
        )
    image_BT = torch.full(is_image_BT.shape, -1)
    lengths_I = torch.tensor(list(lengths), dtype=torch.int64)
    image_BT[is_image_BT] = torch.arange(len(lengths)).repeat_interleave(lengths_I)
    first_B = image_BT.masked_fill(~is_image_BT, len(lengths)).amin(dim=1)
    rows = is_image_BT.any(dim=1).nonzero().squeeze(1)
    is_cut = first_B[rows[1:]] == image_BT.amax(dim=1)[rows[:-1]]
    if bool(is_cut.any()):
        raise ValueError(
            f"an image of row {int(rows[:-1][is_cut][0])} ends in a later row; give each row the "
            "placeholders of whole images"
        )
    return torch.where(is_image_BT, image_BT - first_B[:, None], -1)


def join_images(kinds: Sequence[Tensor]) -> Tensor:
    """Number images of several kinds [B, T], each kind numbered alone, by their first positions."""
    starts = [_starts_images(image_BT) for image_BT in kinds]
    number_BT = torch.stack(starts).any(dim=0).cumsum(1) - 1
    joined_BT = torch.full_like(kinds[0], -1)
    for image_BT, starts_BT in zip(kinds, starts, strict=True):
        # A position belongs to the newest image of its kind.
        newest_BT = number_BT.masked_fill(~starts_BT, -1).cummax(dim=1).values
        joined_BT = torch.where(image_BT >= 0, newest_BT, joined_BT)
    return joined_BT


def _starts_images(image_BT: Tensor) -> Tensor:
    """Mark the first position of each image; the numbers of a row rise."""
    before_BT = torch.nn.functional.pad(image_BT.cummax(dim=1).values[:, :-1], (1, 0), value=-1)
    return image_BT > before_BT


def shift_labels(labels_BT: Tensor) -> Tensor:
    """Turn the host's labels (at t, the token at t) into targets (at t, the token at t+1)."""
    shifted_BT = torch.roll(labels_BT, -1, dims=1)
    shifted_BT[:, -1] = IGNORE
    return shifted_BT


def host_labels(labels_BT: Tensor) -> Tensor:
    """Undo ``shift_labels``, for a host that shifts labels itself."""
    unshifted_BT = labels_BT.roll(1, dims=1)
    unshifted_BT[:, 0] = IGNORE
    return unshifted_BT
