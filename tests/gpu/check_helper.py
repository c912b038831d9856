"""A check measures an error and says how large it may be; what is checked is not known here."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class Measured:
    error: float
    bound: float
    """0.0 where nothing but equality will do."""

    note: str = ""

    @property
    def holds(self) -> bool:
        """Not so where the error is NaN."""
        return self.error <= self.bound


@dataclass(frozen=True)
class Check:
    name: str
    dtype: str
    measure: Callable[[], Measured]
    subject: str = ""
    """The model that is looked at, where several are in the same way."""


@dataclass(frozen=True)
class Skipped:
    """A part that does not run here."""

    what: str
    why: str


@dataclass(frozen=True)
class Result:
    name: str
    dtype: str
    subject: str
    passed: bool
    error: float | None
    bound: float | None
    seconds: float
    note: str


def run_check(check: Check) -> Result:
    """A check that breaks has failed, whatever broke it; the others still run."""
    begin = time.monotonic()
    error = bound = None
    try:
        found = check.measure()
        passed, error, bound, note = found.holds, float(found.error), found.bound, found.note
    except Exception as problem:
        traceback.print_exc(file=sys.stderr)
        passed, note = False, f"{type(problem).__name__}: {problem}".splitlines()[0]
    seconds = round(time.monotonic() - begin, 3)
    return Result(check.name, check.dtype, check.subject, passed, error, bound, seconds, note)


def worst(found: Iterable[Measured]) -> Measured:
    """The one that is nearest to its bound, or farthest above it; any that is NaN comes first."""
    return max(found, key=lambda m: m.error / m.bound if m.error == m.error else float("inf"))


def num_different(found: Named, expected: Named) -> int:
    """Elements that differ in any bit that counts; the two must name tensors of the same kind."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert tensor.shape == expected[name].shape, name
    return sum(int((tensor != expected[name]).sum()) for name, tensor in found.items())
