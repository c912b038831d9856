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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regate_ds.algorithm.batch import SampleKey
from regate_ds.stores.atomic_file import write_atomically
from regate_ds.stores.digests import IndexedSample, as_words, digest_of
from regate_ds.stores.index_part import IndexPart
from regate_ds.stores.keys import UNKNOWN, SampleKeys

INDEX_FORMAT = 3
"""Version of the saved file and of the fingerprint."""

_ANEW = "make the store anew in an empty folder (regate teacher CONFIG, or score_dataset)"


@dataclass(frozen=True)
class AnswerIndex:
    """One row for each sample, in the order of the data set. Equal fingerprints: equal indexes."""

    keys: SampleKeys = field(compare=False)
    """The sample of each row."""

    offsets: Tensor = field(compare=False)
    """int64 [S+1]: the values of row i are ``offsets[i]`` to ``offsets[i+1]`` of the flat array."""

    num_labels: Tensor = field(compare=False)
    """int64 [S]: number of label positions of each sample."""

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
        return cls.join([IndexPart.of(samples)])

    @classmethod
    def join(cls, parts: Sequence[IndexPart]) -> AnswerIndex:
        """Make the index of a data set from those of its consecutive parts.

        ValueError names the sample if two have one key.
        """
        keys = SampleKeys.join([part.keys for part in parts])
        if (row := keys.first_twice()) is not None:
            name, number = keys[row]
            raise ValueError(
                f"sample {name!r} record {number} is in the data twice; give each data set a name "
                "of its own"
            )
        num_labels = _joined([part.num_labels for part in parts])
        offsets = torch.zeros(len(keys) + 1, dtype=torch.int64)
        torch.cumsum(num_labels, 0, out=offsets[1:])
        digests = [part.digests for part in parts]
        fingerprint = start_fingerprint()
        for digest in digests:
            fingerprint.update(digest)
        return cls(
            keys,
            offsets,
            num_labels,
            _joined([part.num_positions for part in parts]),
            _joined([part.label_hashes for part in parts]),
            as_words(digests),
            fingerprint.hexdigest(),
        )

    @property
    def num_samples(self) -> int:
        return len(self.keys)

    @property
    def num_tokens(self) -> int:
        """Number of label positions of the whole data set."""
        return int(self.offsets[-1])

    def rows(self, keys: Sequence[SampleKey]) -> list[int]:
        """Return the row of each key. ``ValueError`` names a key that the index does not have."""
        return self._find(keys).tolist()

    def locate(self, keys: Sequence[SampleKey]) -> Tensor:
        """Return int64 [N]: the places of these samples' values, sample by sample, as given."""
        rows = torch.from_numpy(self._find(keys))
        return spans(self.offsets[rows], self.num_labels[rows])

    def rows_in(self, other: AnswerIndex) -> Tensor:
        """Return int64 [S]: the row of each sample of this index in another index.

        ``ValueError`` names a sample that is not there, or has other tokens or labels there.
        """
        rows_S = torch.from_numpy(other._find(self.keys))
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

    def _find(self, keys: Sequence[SampleKey]) -> np.ndarray:
        """Return int64 [R]: the row of each key."""
        rows_R = self.keys.find(keys)
        if (is_unknown_R := rows_R == UNKNOWN).any():
            name, number = keys[int(is_unknown_R.argmax())]
            raise ValueError(
                f"sample {name!r} record {number} is not in the answer index "
                f"{self.fingerprint[:12]} of {self.num_samples} samples; build the index from the "
                "data that is trained on"
            )
        return rows_R

    def save(self, path: Path) -> None:
        """Write one npz file, atomically."""
        write_atomically(Path(path), self.to_bytes())

    def to_bytes(self) -> bytes:
        """Return what ``save`` writes. Equal indexes give equal bytes."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            format=np.int64(INDEX_FORMAT),
            names=np.array(self.keys.names, dtype=str),
            name_numbers=self.keys.name_numbers,
            record_numbers=self.keys.record_numbers,
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
        return cls(
            SampleKeys(saved["names"].tolist(), saved["name_numbers"], saved["record_numbers"]),
            torch.from_numpy(saved["offsets"]),
            torch.from_numpy(saved["offsets"]).diff(),
            torch.from_numpy(saved["num_positions"]),
            torch.from_numpy(saved["label_hashes"]),
            torch.from_numpy(saved["digests"]),
            str(saved["fingerprint"]),
        )


def start_fingerprint() -> Any:
    """Return a SHA-256 that the digests of all samples are yet to be put into."""
    return hashlib.sha256(b"regate answer index %d" % INDEX_FORMAT)


def spans(starts: Tensor, lengths: Tensor) -> Tensor:
    """Return int64 [N]: the integers of each range [start, start + length), range after range."""
    first = starts - (lengths.cumsum(0) - lengths)
    total = int(lengths.sum())
    return first.repeat_interleave(lengths, output_size=total) + torch.arange(total)


def _joined(columns: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *columns]))
