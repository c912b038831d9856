"""The answer index of some consecutive samples, made in one process and joined in another.

Shapes: S samples of the part, N label positions of one sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

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
            ids_S, labels_S = (
                sample.input_ids_S.numpy(force=True),
                sample.labels_S.numpy(force=True),
            )
            is_label_S = labels_S != IGNORE
            _require_shifted(sample.key, ids_S, labels_S, is_label_S)
            label_ids_N = torch.from_numpy(labels_S[is_label_S])
            keys.append(sample.key)
            columns.append((len(label_ids_N), len(labels_S), hash_labels(label_ids_N)))
            digests.append(digest_of(sample))
        table = np.array(columns, dtype=np.int64).reshape(-1, 3)
        num_labels, num_positions, hashes = (table[:, column].copy() for column in range(3))
        return cls(SampleKeys.of(keys), num_labels, num_positions, hashes, b"".join(digests))


def _require_shifted(
    key: SampleKey, ids_S: np.ndarray, labels_S: np.ndarray, is_label_S: np.ndarray
) -> None:
    """Refuse unshifted labels, where each position has its own token, as in Hugging Face models."""
    if (labels_S[:-1] == ids_S[1:])[is_label_S[:-1]].all():
        return
    if (labels_S == ids_S)[is_label_S].all():
        raise ValueError(
            f"sample {key[0]!r} record {key[1]}: its labels are each position's own "
            "token, not the next one; shift them by one (regate_ds.algorithm.batch.shift_labels)"
        )
