"""Where each sample's values lie in a flat array that holds one value for each label position.

The reference store and the difficulty store share this layout. Shapes: S samples of the data set,
N label positions of the samples asked for, R of these samples.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from regate_ds.algorithm.batch import IGNORE, SampleKey
from regate_ds.stores.atomic_file import write_atomically
from regate_ds.stores.digests import IndexedSample, as_words, digest_of, hash_labels

INDEX_FORMAT = 3
"""Version of the saved file and of the fingerprint."""

_ANEW = "make the store anew in an empty folder (regate teacher CONFIG, or score_dataset)"


@dataclass(frozen=True)
class AnswerIndex:
    """One row for each sample, in the order of the data set. Equal fingerprints: equal indexes."""

    keys: tuple[SampleKey, ...] = field(compare=False)

    offsets: Tensor = field(compare=False)
    """int64 [S+1]: the values of row i are ``offsets[i]`` to ``offsets[i+1]`` of the flat array."""

    num_positions: Tensor = field(compare=False)
    """int64 [S]: number of tokens of each sample, prompt and placeholders included."""

    label_hashes: Tensor = field(compare=False)
    """int64 [S]: ``hash_labels`` of each sample, to recognise its labels in a micro-batch."""

    digests: Tensor = field(compare=False)
    """int64 [S, 2]: a 128-bit hash over each sample's key, token ids and labels, after truncation;
    every placeholder counts as the same id."""

    fingerprint: str
    """Hash over the digests of all samples, in order."""

    @classmethod
    def build(cls, samples: Iterable[IndexedSample]) -> AnswerIndex:
        """Build the index in one pass over the samples.

        ValueError names the sample if two have one key, or if its labels are not shifted.
        """
        keys: list[SampleKey] = []
        num_labels, num_positions, hashes, digests = [], [], [], []
        for sample in samples:
            _require_shifted(sample)
            label_ids_N = sample.labels_S[sample.labels_S != IGNORE]
            keys.append(sample.key)
            num_labels.append(label_ids_N.numel())
            num_positions.append(sample.labels_S.numel())
            hashes.append(hash_labels(label_ids_N))
            digests.append(digest_of(sample))
        _require_unique(keys)
        offsets = torch.tensor([0, *num_labels], dtype=torch.int64).cumsum(0)
        return cls(
            tuple(keys),
            offsets,
            torch.tensor(num_positions, dtype=torch.int64),
            torch.tensor(hashes, dtype=torch.int64),
            as_words(digests),
            hashlib.sha256(
                b"regate answer index %d" % INDEX_FORMAT + b"".join(digests)
            ).hexdigest(),
        )

    @property
    def num_samples(self) -> int:
        return len(self.keys)

    @property
    def num_tokens(self) -> int:
        """Number of label positions of the whole data set."""
        return int(self.offsets[-1])

    @cached_property
    def num_labels(self) -> Tensor:
        """int64 [S]: number of label positions of each sample."""
        return self.offsets.diff()

    @cached_property
    def _row_of(self) -> dict[SampleKey, int]:
        return {key: row for row, key in enumerate(self.keys)}

    def rows(self, keys: Sequence[SampleKey]) -> list[int]:
        """Return the row of each key. ``ValueError`` names a key that the index does not have."""
        try:
            return [self._row_of[key] for key in keys]
        except KeyError as unknown:
            name, number = unknown.args[0]
            raise ValueError(
                f"sample {name!r} record {number} is not in the answer index "
                f"{self.fingerprint[:12]} of {self.num_samples} samples; build the index from the "
                "data that is trained on"
            ) from None

    def locate(self, keys: Sequence[SampleKey]) -> Tensor:
        """Return int64 [N]: the places of these samples' values, sample by sample, as given."""
        rows = torch.tensor(self.rows(keys), dtype=torch.int64)
        return spans(self.offsets[rows], self.num_labels[rows])

    def rows_in(self, other: AnswerIndex) -> Tensor:
        """Return int64 [S]: the row of each sample of this index in another index.

        ``ValueError`` names a sample that is not there, or has other tokens or labels there.
        """
        rows_S = torch.tensor(other.rows(self.keys), dtype=torch.int64)
        is_other_S = (other.digests[rows_S] != self.digests).any(dim=1)
        if bool(is_other_S.any()):
            name, number = self.keys[int(is_other_S.nonzero()[0])]
            raise ValueError(
                f"sample {name!r} record {number} has other tokens or labels in the answer index "
                f"{other.fingerprint[:12]}"
            )
        return rows_S

    def holds(self, sample: IndexedSample, row: int) -> bool:
        """Return whether the row's key, token ids and labels are those of the sample."""
        return torch.equal(as_words([digest_of(sample)])[0], self.digests[row])

    def save(self, path: Path) -> None:
        """Write one npz file, atomically."""
        write_atomically(Path(path), self.to_bytes())

    def to_bytes(self) -> bytes:
        """Return what ``save`` writes. Equal indexes give equal bytes."""
        names, name_numbers = np.unique([name for name, _ in self.keys], return_inverse=True)
        buffer = io.BytesIO()
        np.savez(
            buffer,
            format=np.int64(INDEX_FORMAT),
            names=names.astype(str),
            name_numbers=name_numbers.astype(np.int32),
            record_numbers=np.array([number for _, number in self.keys], dtype=np.int64),
            offsets=self.offsets.numpy(),
            num_positions=self.num_positions.numpy(),
            label_hashes=self.label_hashes.numpy(),
            digests=self.digests.numpy(),
            fingerprint=np.array(self.fingerprint),
        )
        return buffer.getvalue()

    @classmethod
    def load(cls, path: Path) -> AnswerIndex:
        """Read what ``save`` wrote. ``ValueError`` names a file that cannot be read."""
        try:
            with np.load(path, allow_pickle=False) as file:
                saved = {name: file[name] for name in file.files}
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"cannot read the answer index {path}: {error}; {_ANEW}") from error
        if (found := int(saved.get("format", 0))) != INDEX_FORMAT:
            raise ValueError(
                f"{path} has index format {found}, this version reads {INDEX_FORMAT}; {_ANEW}"
            )
        names = [str(name) for name in saved["names"]]
        numbers = zip(saved["name_numbers"].tolist(), saved["record_numbers"].tolist())
        return cls(
            tuple((names[name], record) for name, record in numbers),
            torch.from_numpy(saved["offsets"]),
            torch.from_numpy(saved["num_positions"]),
            torch.from_numpy(saved["label_hashes"]),
            torch.from_numpy(saved["digests"]),
            str(saved["fingerprint"]),
        )


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


def spans(starts: Tensor, lengths: Tensor) -> Tensor:
    """Return int64 [N]: the integers of each range [start, start + length), range after range."""
    first = starts - (lengths.cumsum(0) - lengths)
    total = int(lengths.sum())
    return first.repeat_interleave(lengths, output_size=total) + torch.arange(total)


def _require_unique(keys: Sequence[SampleKey]) -> None:
    if len(set(keys)) == len(keys):
        return
    seen: set[SampleKey] = set()
    for name, number in keys:
        if (name, number) in seen:
            raise ValueError(
                f"sample {name!r} record {number} is in the data twice; give each data set a name "
                "of its own"
            )
        seen.add((name, number))
