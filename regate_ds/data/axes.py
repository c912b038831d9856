"""Positions of several axes for packed rows: each sample is numbered as if it stood alone.

Shapes: A axes, B rows, T positions of a row, N samples, S positions of the longest one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from regate_ds.data.llava.sample import EncodedSample

_MARKS = "mm_token_type_ids"
"""Input that marks the positions of images and videos."""

_NUM_AXES = 3
"""Time, height and width."""


class AxesOfSamples:
    """Numbers samples by the model's own ``get_rope_index``."""

    def __init__(self, base_model: Any) -> None:
        """base_model: the model below the head, on "meta" or not: only its config is used."""
        self._number = base_model.get_rope_index
        # What tells it the sizes of images and videos, by their names among the model's inputs.
        self._names = {*signature(self._number).parameters} - {
            "input_ids",
            "attention_mask",
            _MARKS,
        }

    def __call__(
        self,
        rows: Sequence[Sequence[EncodedSample]],
        text_BT: Tensor,
        inputs: Mapping[str, Any],
    ) -> Tensor:
        """Return positions [1 + A, B, T], the text's own first.

        rows: the samples of each packed row. text_BT: positions that restart in each sample, and in
        the padding. inputs: the model's other inputs, images in the order of the rows; without
        marks there are no images.
        """
        if _MARKS not in inputs:
            return text_BT.repeat(1 + _NUM_AXES, 1, 1)
        places = _places(rows)
        mask_NS = pad_sequence([torch.ones(end - start) for _, start, end in places], True)
        axes_ANS, _ = self._number(
            _rows_of(inputs["input_ids"], places),
            attention_mask=mask_NS.long(),
            **{_MARKS: _rows_of(inputs[_MARKS], places)},
            **{name: inputs[name] for name in self._names & inputs.keys()},
        )
        found = text_BT.repeat(1 + len(axes_ANS), 1, 1)
        for number, (row, start, end) in enumerate(places):
            found[1:, row, start:end] = axes_ANS[:, number, : end - start]
        return found


def _places(rows: Sequence[Sequence[EncodedSample]]) -> list[tuple[int, int, int]]:
    """Return the row, the first position and the one after the last of each sample."""
    places = []
    for number, row in enumerate(rows):
        start = 0
        for sample in row:
            places.append((number, start, start + len(sample)))
            start += len(sample)
    return places


def _rows_of(values_BT: Tensor, places: Sequence[tuple[int, int, int]]) -> Tensor:
    """Return [N, S]: each sample's values in a row of its own, padded with zeros."""
    return pad_sequence([values_BT[row, start:end] for row, start, end in places], True)
