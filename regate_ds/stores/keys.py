"""The keys of all samples of a data set as columns: 12 bytes a sample, and no Python objects.

Shapes: S samples of the data set, R keys asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import overload

import numpy as np

from regate_ds.algorithm.batch import SampleKey

UNKNOWN = -1
"""What ``SampleKeys.find`` returns for a key that is not there."""

_BLOCK = 65_536
"""Number of keys that are Python objects at a time while all are passed through."""


class SampleKeys(Sequence[SampleKey]):
    """The keys in the order of the data set; it reads like a tuple of them."""

    def __init__(
        self, names: Sequence[str], name_numbers: np.ndarray, record_numbers: np.ndarray
    ) -> None:
        """names: the data sets, sorted. name_numbers: int32 [S], each sample's place among them.
        record_numbers: int64 [S]."""
        self.names = tuple(names)
        self.name_numbers, self.record_numbers = name_numbers, record_numbers

    @classmethod
    def of(cls, keys: Sequence[SampleKey]) -> SampleKeys:
        """Make the columns of keys that are given as objects."""
        if isinstance(keys, cls):
            return keys
        names = sorted({name for name, _ in keys})
        place = {name: number for number, name in enumerate(names)}
        return cls(
            names,
            np.fromiter((place[name] for name, _ in keys), np.int32, len(keys)),
            np.fromiter((number for _, number in keys), np.int64, len(keys)),
        )

    @classmethod
    def join(cls, parts: Sequence[SampleKeys]) -> SampleKeys:
        """Put the keys of consecutive parts of a data set behind one another."""
        names = sorted({name for part in parts for name in part.names})
        columns = [part.name_numbers_among(names) for part in parts]
        return cls(
            names,
            np.concatenate([np.empty(0, np.int32), *columns]),
            np.concatenate([np.empty(0, np.int64), *(part.record_numbers for part in parts)]),
        )

    def name_numbers_among(self, names: Sequence[str]) -> np.ndarray:
        """Return int32 [S]: each sample's place among other names, ``UNKNOWN`` if it has none."""
        place = {name: number for number, name in enumerate(names)}
        table = np.array([place.get(name, UNKNOWN) for name in self.names], dtype=np.int32)
        return table[self.name_numbers]

    def find(self, keys: Sequence[SampleKey]) -> np.ndarray:
        """Return int64 [R]: the row of each key; of a key that is there several times, the first.

        ``UNKNOWN`` stands for a key that is not there.
        """
        asked = SampleKeys.of(keys)
        name_R, record_R = asked.name_numbers_among(self.names), asked.record_numbers
        rows_R = np.full(len(asked), UNKNOWN, dtype=np.int64)
        for number in {*name_R.tolist()} - {UNKNOWN}:
            is_own_R = name_R == number
            rows_R[is_own_R] = self._find_records(number, record_R[is_own_R])
        return rows_R

    def first_twice(self) -> int | None:
        """Return the first row whose key an earlier row has; None if all keys differ."""
        starts_N, record_S, order_S = self._sorted
        if order_S is None:
            return None
        is_same = record_S[1:] == record_S[:-1]
        starts = starts_N[1:-1]
        is_same[starts[(starts > 0) & (starts < len(self))] - 1] = False
        rows = order_S[1:][is_same]
        return int(rows.min()) if len(rows) else None

    def __len__(self) -> int:
        return len(self.record_numbers)

    @overload
    def __getitem__(self, row: int) -> SampleKey: ...

    @overload
    def __getitem__(self, row: slice) -> tuple[SampleKey, ...]: ...

    def __getitem__(self, row: int | slice) -> SampleKey | tuple[SampleKey, ...]:
        if isinstance(row, slice):
            return tuple(self._objects(self.name_numbers[row], self.record_numbers[row]))
        return self.names[int(self.name_numbers[row])], int(self.record_numbers[row])

    def __iter__(self) -> Iterator[SampleKey]:
        for start in range(0, len(self), _BLOCK):
            yield from self[start : start + _BLOCK]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SampleKeys):
            return NotImplemented
        return (
            self.names == other.names
            and np.array_equal(self.name_numbers, other.name_numbers)
            and np.array_equal(self.record_numbers, other.record_numbers)
        )

    def _objects(self, name_R: np.ndarray, record_R: np.ndarray) -> Iterator[SampleKey]:
        names = self.names
        return ((names[n], record) for n, record in zip(name_R.tolist(), record_R.tolist()))

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return where each name starts among the sorted keys, [names + 1], the record numbers of
        these, [S], and their rows, [S]; None in place of the rows if the keys are in order."""
        name_S, record_S, order_S = self.name_numbers, self.record_numbers, None
        rises = (name_S[1:] > name_S[:-1]) | (
            (name_S[1:] == name_S[:-1]) & (record_S[1:] > record_S[:-1])
        )
        if not rises.all():
            # Stable: of equal keys, the first one stays first.
            order_S = np.lexsort((record_S, name_S))
            name_S, record_S = name_S[order_S], record_S[order_S]
        return np.searchsorted(name_S, np.arange(len(self.names) + 1)), record_S, order_S

    def _find_records(self, number: int, record_R: np.ndarray) -> np.ndarray:
        starts_N, record_S, order_S = self._sorted
        own = record_S[starts_N[number] : starts_N[number + 1]]
        place_R = np.searchsorted(own, record_R)
        is_there_R = place_R < len(own)
        is_there_R[is_there_R] = own[place_R[is_there_R]] == record_R[is_there_R]
        rows_R = place_R + starts_N[number]
        if order_S is not None:
            rows_R = order_S[np.minimum(rows_R, len(self) - 1)]
        return np.where(is_there_R, rows_R, UNKNOWN)
