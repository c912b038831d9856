"""Join encoded samples into micro-batches: workers decode images, rows are padded or packed.

Shapes: B rows, T positions of a row, S positions of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from regate_ds.algorithm.batch import IGNORE, TokenBatch
from regate_ds.data.axes import AxesOfSamples
from regate_ds.data.interfaces import RecordEncoder, VisionInputs
from regate_ds.data.llava.clips import Visual, visuals_of
from regate_ds.data.llava.records import BadRecord, Record, SampleError
from regate_ds.data.llava.sample import EncodedSample

_Read = TypeVar("_Read")


@dataclass(frozen=True)
class LoadedSample:
    """One sample, with its decoded images (RGB) and videos in reading order."""

    encoded: EncodedSample
    images: tuple[Visual, ...]


@dataclass(frozen=True)
class Batch:
    """One micro-batch: the model's inputs, and what the method needs to know of it."""

    inputs: dict[str, Any]
    """Keyword arguments for the model."""

    tokens: TokenBatch
    """Keys, segments and labels, in CPU memory."""

    def to(self, device: torch.device | str) -> Batch:
        """Move the tensors of ``inputs``. ``tokens`` stay on the CPU, where steps are planned."""
        return Batch(moved(self.inputs, device), self.tokens)

    def pin_memory(self) -> Batch:
        """Pin the tensors of ``inputs``, for loaders with ``pin_memory=True``: a copy by ``to``
        then overlaps with the GPU's work."""
        pinned = {k: x.pin_memory() if isinstance(x, Tensor) else x for k, x in self.inputs.items()}
        return Batch(pinned, self.tokens)

    def keys(self) -> NoReturn:
        """Refuse, by TypeError, to be a model's inputs: it has no plan yet. So do the next two."""
        raise TypeError(
            "a micro-batch of regate.collate has no plan yet: take it from regate.windows(loader, "
            "...); to evaluate, use a loader with your own collate function"
        )

    def items(self) -> NoReturn:
        self.keys()

    def __getitem__(self, name: Any) -> NoReturn:
        self.keys()


def moved(inputs: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Return the inputs with all tensors on ``device`` and everything else as it is."""
    return {
        name: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x
        for name, x in inputs.items()
    }


class Indexed(Protocol):
    """What is known of the samples of a data set from an earlier reading."""

    def require_unchanged(self, row: int, sample: EncodedSample) -> None:
        """Refuse, by ValueError naming it, the sample of a record that is not as it was."""
        ...

    def has_become_bad(self, bad: BadRecord) -> ValueError:
        """Make the error for a record that could be used then."""
        ...


class SampleDataset(Dataset[LoadedSample]):
    """A data set of records, which encodes a record and decodes its images in ``__getitem__``."""

    def __init__(
        self, records: Sequence[Record], encoder: RecordEncoder, indexed: Indexed | None = None
    ) -> None:
        """indexed: what each sample must be as; None takes them as they come."""
        self._records = records
        self._encoder = encoder
        self._indexed = indexed

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> LoadedSample:
        record = self._records[index]
        return self._read(lambda: self._load(index, record))

    def encode(self, index: int) -> EncodedSample:
        """Encode a record without decoding its images."""
        record = self._records[index]
        return self._read(lambda: self._encode(index, record))

    def _load(self, index: int, record: Record) -> LoadedSample:
        sample = self._encode(index, record)
        return LoadedSample(sample, visuals_of(record, sample.images))

    def _encode(self, index: int, record: Record) -> EncodedSample:
        sample = self._encoder.encode(record)
        if self._indexed is not None:
            self._indexed.require_unchanged(index, sample)
        return sample

    def _read(self, read: Callable[[], _Read]) -> _Read:
        try:
            return read()
        except SampleError as error:
            if self._indexed is None or error.bad is None:
                raise
            raise self._indexed.has_become_bad(error.bad) from error


class Collator:
    """Joins loaded samples into one micro-batch of right-padded rows.

    Without ``pack_length`` each row is one sample, and no attention mask is made: under a causal
    mask no token sees the padding to its right. With it, samples are packed first-fit into rows of
    at most that many tokens, and ``position_ids`` restart in each sample and in the padding.
    """

    def __init__(
        self,
        *,
        pad_id: int,
        vision: VisionInputs | None,
        pack_length: int | None = None,
        axes: AxesOfSamples | None = None,
    ) -> None:
        """Set up for one model. ``vision`` makes its image inputs; None for a text-only model.
        ``axes`` numbers packed samples where the model's positions have several."""
        self._pad_id = pad_id
        self._vision = vision
        self._pack_length, self._axes = pack_length, axes

    def __call__(self, samples: Sequence[LoadedSample]) -> Batch:
        rows = self._rows(samples)
        encoded = [[sample.encoded for sample in row] for row in rows]
        segment_BT, position_BT = _layout([[len(sample) for sample in row] for row in encoded])
        image_BT = _pad([[sample.image_S for sample in row] for row in encoded], -1)
        tokens = TokenBatch(
            keys=tuple(tuple(sample.key for sample in row) for row in encoded),
            segment_BT=segment_BT,
            labels_BT=_pad([[sample.labels_S for sample in row] for row in encoded], IGNORE),
            image_BT=image_BT,
        )
        ids_BT = _pad([[sample.input_ids_S for sample in row] for row in encoded], self._pad_id)
        inputs: dict[str, Any] = {"input_ids": ids_BT}
        vision = self._vision_inputs(rows, ids_BT, image_BT >= 0)
        if self._pack_length is not None:
            inputs["position_ids"] = position_BT
            if self._axes is not None:
                inputs["position_ids"] = self._axes(encoded, position_BT, inputs | vision)
        return Batch(inputs | vision, tokens)

    def _rows(self, samples: Sequence[LoadedSample]) -> list[list[LoadedSample]]:
        if self._pack_length is None:
            return [[sample] for sample in samples]
        lengths = [len(sample.encoded) for sample in samples]
        for sample, length in zip(samples, lengths):
            if length > self._pack_length:
                raise ValueError(
                    f"sample {sample.encoded.key} has {length} tokens, a packed row only "
                    f"{self._pack_length}; set data.pack_length to data.max_length or more"
                )
        return [[samples[i] for i in row] for row in first_fit(lengths, self._pack_length)]

    def _vision_inputs(
        self, rows: list[list[LoadedSample]], ids_BT: Tensor, is_placeholder_BT: Tensor
    ) -> dict[str, Tensor]:
        images = [list(sample.images) for row in rows for sample in row if sample.images]
        if self._vision is None:
            if images:
                raise ValueError(
                    f"{sum(map(len, images))} images for a model without a vision tower; use a "
                    "multimodal student, or data without images"
                )
            return {}
        extra = self._vision.extra_inputs(ids_BT, is_placeholder_BT)
        return extra | (self._vision.sample_pixels(images) if images else {})


def first_fit(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Put each length, in order, into the first row with room. Return rows of indices."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        row = next((r for r, free in enumerate(room) if length <= free), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(limit)
        rows[row].append(index)
        room[row] -= length
    return rows


def _layout(lengths: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return segments [B, T] (-1 is padding) and positions [B, T], from 0 in each segment."""
    num_tokens = max(sum(row) for row in lengths)
    segment_BT = torch.full((len(lengths), num_tokens), -1)
    position_BT = torch.empty_like(segment_BT)
    for b, row in enumerate(lengths):
        end = 0
        for segment, length in enumerate(row):
            segment_BT[b, end : end + length] = segment
            position_BT[b, end : end + length] = torch.arange(length)
            end += length
        position_BT[b, end:] = torch.arange(num_tokens - end)
    return segment_BT, position_BT


def _pad(rows: list[list[Tensor]], value: float | bool) -> Tensor:
    """Join the samples of each row, and pad each row on the right to [B, T]."""
    joined = [torch.cat(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(joined, batch_first=True, padding_value=value)
