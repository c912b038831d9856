"""All scores, by the name that a configuration gives them."""

from __future__ import annotations

from regate_ds.algorithm.scores.fused import Fused
from regate_ds.algorithm.scores.random import Random
from regate_ds.algorithm.scores.score import Score

SCORES: dict[str, type[Score]] = {
    "fused": Fused,
    "random": Random,
}
