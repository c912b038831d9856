"""All scores, by the name that a configuration gives them."""

from __future__ import annotations

from regate_ds.algorithm.scores.difficulty import DifficultyOnly
from regate_ds.algorithm.scores.entropy import Entropy
from regate_ds.algorithm.scores.excess_loss import ExcessLoss
from regate_ds.algorithm.scores.fused import Fused
from regate_ds.algorithm.scores.gain import Gain
from regate_ds.algorithm.scores.loss import LastLoss
from regate_ds.algorithm.scores.random import Random
from regate_ds.algorithm.scores.reference import ReferenceOnly
from regate_ds.algorithm.scores.score import Score

SCORES: dict[str, type[Score]] = {
    "fused": Fused,
    "random": Random,
    "reference": ReferenceOnly,
    "difficulty": DifficultyOnly,
    "loss": LastLoss,
    "excess_loss": ExcessLoss,
    "entropy": Entropy,
    "gain": Gain,
}
