"""A small job of ranking, and a main that runs it until it is killed.

As a program: ``python -m tests.ranking.job_helper STORE`` ranks slowly and says each batch on
stdout, so that a test can kill it in the middle.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed as dist

from regate_ds.algorithm.rankings.diversity import DiversityOrder
from regate_ds.algorithm.rankings.ranking import Picture
from regate_ds.ranking.job import PictureInputs, RankJob, Units, rank_pictures
from regate_ds.stores.image_orders.pictures import PictureTable, ShownPicture

NUM_UNITS = 12
LARGEST = 12


def unit_of(number: int) -> list[ShownPicture]:
    """One to three pictures; the first of each third unit is shown by another sample as well."""
    shown = []
    for picture in range(1 + number % 3):
        images = [(("set", number), picture)]
        if picture == 0 and number % 3 == 0:
            images.append((("set", 100 + number), 0))
        shown.append(ShownPicture(4 + (5 * number + picture) % 9, tuple(images)))
    return shown


UNITS = [unit_of(number) for number in range(NUM_UNITS)]


def units_of(units: list[list[ShownPicture]]) -> Units:
    table = PictureTable.of(shown for unit in units for shown in unit)
    return Units(table, np.cumsum([0, *map(len, units)]))


def read(unit: int) -> PictureInputs:
    generator = torch.Generator().manual_seed(unit)
    return {"values": torch.randn(len(UNITS[unit]), LARGEST, 3, generator=generator)}


def look(inputs: PictureInputs, sizes: Sequence[int]) -> list[Picture]:
    pairs = zip(inputs["values"], sizes, strict=True)
    return [Picture(features_nF=values[:size]) for values, size in pairs]


class Counting:
    """A ``look`` that counts its batches and pictures, and fails after a number of batches."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.num_batches = self.num_pictures = 0
        self._fail_after = fail_after

    def __call__(self, inputs: PictureInputs, sizes: Sequence[int]) -> list[Picture]:
        if self.num_batches == self._fail_after:
            raise RuntimeError("power cut")
        self.num_batches += 1
        self.num_pictures += len(sizes)
        return look(inputs, sizes)


def make_job(store: Path, **changes) -> RankJob:
    settings = {
        "units": units_of(UNITS),
        "read": read,
        "look": look,
        "ranking": DiversityOrder(),
        "fingerprint": "0123456789abcdef",
        "model_id": "tower-1",
        "store": store,
        "batch": 4,
    }
    return RankJob(**{**settings, **changes})


def files_of(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


def _look_slowly(inputs: PictureInputs, sizes: Sequence[int]) -> list[Picture]:
    print("batch", flush=True)
    time.sleep(0.05)
    return look(inputs, sizes)


def check_ranks(rank: int, folder: str) -> None:
    """Two ranks: each ranks a part, and ranks with other models stop."""
    counting = Counting()
    rank_pictures(make_job(Path(folder) / "many", look=counting), dist.group.WORLD)
    assert 0 < counting.num_pictures < sum(map(len, UNITS))
    other = make_job(Path(folder) / "other", model_id=f"tower-{rank}")
    with pytest.raises(RuntimeError, match=f"ab, model tower-{rank} and ranking diversity, other"):
        rank_pictures(other, dist.group.WORLD)


if __name__ == "__main__":
    rank_pictures(make_job(Path(sys.argv[1]), look=_look_slowly))
