from __future__ import annotations

import io
import re
from contextlib import redirect_stderr

import pytest

from regate_ds.job.progress import progress


def shown(total: int, **how) -> str:
    with redirect_stderr(io.StringIO()) as screen, progress(total, **how) as bar:
        bar.update(total // 2)
        bar.set_postfix(loss="0.5")
    return screen.getvalue().split("\r")[-1]


def test_a_bar_tells_its_rate_its_end_and_what_is_put_beside_it():
    line = shown(8, desc="run", unit="step")
    assert re.search(r"run:  50%.* 4/8 steps \[.*step/s, ends \d\d:\d\d\], loss=0.5", line), line


@pytest.mark.parametrize(
    ("total", "text"), [(900_000, "450000/900000"), (4_000_000, "2.00M/4.00M")]
)
def test_millions_are_printed_short(total: int, text: str):
    assert f" {text} tokens " in shown(total, desc="teacher", unit="token")


def test_a_bar_that_is_not_shown_prints_nothing():
    assert shown(8, desc="run", unit="step", show=False) == ""
