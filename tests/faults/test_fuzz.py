"""A few of the fuzzed inputs, and that a reader's faults are seen as such."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.faults import fuzz
from tests.faults.fuzz_subjects import MUST, SUBJECTS


def test_changed_inputs_are_read_or_refused():
    ends = fuzz.tried(range(30 * len(SUBJECTS)), seed=1)
    assert {name for name, _ in ends} == {subject.name for subject in SUBJECTS}
    assert {end for _, end in ends} == {"read", "refused"}


def _two_lines() -> None:
    raise ValueError("first\nsecond")


@pytest.mark.parametrize(
    ("read", "end"),
    [
        (lambda _: {}["none"], "traceback"),
        (lambda _: b"\xff".decode(), "traceback"),
        (lambda _: _two_lines(), "traceback"),
        (lambda _: time.sleep(5), "hang"),
        (lambda _: None, "accepted"),
    ],
)
def test_a_reader_that_is_wrong_is_found(
    read: Any, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fuzz, "PATIENCE", 1)
    wrong = replace(SUBJECTS[0], change=lambda *_: MUST, read=read)
    fuzz.signal.signal(fuzz.signal.SIGALRM, fuzz._too_long)
    assert fuzz._end_of(wrong, Random(0), tmp_path)[0] == end
