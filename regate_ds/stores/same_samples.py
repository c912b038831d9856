"""Refuse samples that have changed since the values of a store were computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from regate_ds.algorithm.batch import SampleKey, TokenBatch
from regate_ds.algorithm.window import window_keys
from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.stores.digests import hash_labels

_WAYS_OUT = (
    "compute the store again for this data, or, where augmentation changes it, let the teacher run "
    "online (teacher.mode=online; Teacher.online() in a loop of your own)"
)


def require_as_indexed(window: Sequence[TokenBatch], index: AnswerIndex) -> None:
    """Refuse, by ``ValueError`` naming it, a sample that differs from the index.

    Its answer tokens and its number of positions are compared. Padding that no attention mask marks
    counts as positions, so a sample that reaches the end of its row may be longer than indexed.
    """
    rows = index.rows(window_keys(window))
    known = zip(
        index.num_labels[rows].tolist(),
        index.label_hashes[rows].tolist(),
        index.num_positions[rows].tolist(),
    )
    samples = (sample for batch in window for sample in labelled_samples(batch))
    for (key, labels_N, num_positions, at_end), (num_known, hash_known, length) in zip(
        samples, known, strict=True
    ):
        if len(labels_N) != num_known:
            fault = f"{len(labels_N)} answer tokens here, but {num_known}"
        elif hash_labels(labels_N) != hash_known:
            fault = f"other answer tokens here than its {num_known}"
        elif num_positions < length or (num_positions > length and not at_end):
            fault = f"{num_positions} positions here, image tokens included, but {length}"
        else:
            continue
        raise ValueError(
            f"sample {key[0]!r} record {key[1]} has {fault} in the reference store; {_WAYS_OUT}"
        )


def labelled_samples(batch: TokenBatch) -> Iterator[tuple[SampleKey, Tensor, int, bool]]:
    """Yield each sample's key, label ids, number of positions, and whether it ends its row."""
    keys = batch.flat_keys
    labels = batch.labels_BT[batch.is_label_BT].split(batch.num_labels_per_sample)
    last_B = batch.sample_BT[:, -1].tolist()
    counts = (batch.sample_BT.reshape(-1) + 1).bincount(minlength=len(keys) + 1)[1:].tolist()
    for number, (key, labels_N, count) in enumerate(zip(keys, labels, counts, strict=True)):
        yield key, labels_N, count, number in last_B
