"""How much the image helped the student's starting weights, after arXiv 2602.17186."""

from __future__ import annotations

from dataclasses import dataclass

from regate_ds.algorithm.scores.reference import ReferenceOnly
from regate_ds.algorithm.scores.score import Column


@dataclass(frozen=True, kw_only=True)
class Gain(ReferenceOnly):
    """The text-only teacher's loss less the starting weights' loss with the image: the same in
    every step, and below 0 where the image misled."""

    @property
    def column(self) -> Column:
        return "gain"
