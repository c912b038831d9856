"""The answer index of some consecutive samples, made in one process and joined in another.

Shapes: S samples of the part, N label positions of one sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from regate_ds.algorithm.batch import IGNORE, SampleKey
from regate_ds.stores.digests import IndexedSample, digest_of, hash_labels
from regate_ds.stores.keys import SampleKeys


@dataclass(frozen=True)
class IndexPart:
    """The columns of these samples, in order."""

    keys: SampleKeys

    num_labels: np.ndarray
    """int64 [S]: number of label positions of each sample."""

    num_positions: np.ndarray
    """int64 [S]: number of tokens of each sample."""

    label_hashes: np.ndarray
    """int64 [S]: ``hash_labels`` of each sample."""

    digests: bytes
    """``digest_of`` each sample, one after the other."""

    @classmethod
    def of(cls, samples: Iterable[IndexedSample]) -> IndexPart:
        """Read the samples once. ValueError names one whose labels are not shifted."""
        keys: list[SampleKey] = []
        columns, digests = [], []
        for sample in samples:
            _require_shifted(sample)
            label_ids_N = sample.labels_S[sample.labels_S != IGNORE]
            keys.append(sample.key)
            columns.append((label_ids_N.numel(), sample.labels_S.numel(), hash_labels(label_ids_N)))
            digests.append(digest_of(sample))
        table = np.array(columns, dtype=np.int64).reshape(-1, 3)
        num_labels, num_positions, hashes = (table[:, column].copy() for column in range(3))
        return cls(SampleKeys.of(keys), num_labels, num_positions, hashes, b"".join(digests))


def _require_shifted(sample: IndexedSample) -> None:
    """Refuse unshifted labels, where each position has its own token, as in Hugging Face models."""
    ids_S, labels_S = sample.input_ids_S, sample.labels_S
    is_label_S = labels_S != IGNORE
    is_unshifted = bool((labels_S == ids_S)[is_label_S].all())
    is_shifted = bool((labels_S[:-1] == ids_S[1:])[is_label_S[:-1]].all())
    if bool(is_label_S.any()) and is_unshifted and not is_shifted:
        raise ValueError(
            f"sample {sample.key[0]!r} record {sample.key[1]}: its labels are each position's own "
            "token, not the next one; shift them by one (regate_ds.algorithm.batch.shift_labels)"
        )
