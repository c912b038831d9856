"""Which steps are dense: a warm-up, the start of each cycle, and a block at the end of the run; and
how much the other steps keep, which may move over the run."""

# What a user wrote may be of any type.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

from regate_ds.algorithm.knobs import Rule, is_number, refuse_knobs

Between = Literal["line", "steps"]


@dataclass(frozen=True, kw_only=True)
class MovingShare:
    """A share kept that moves over the sparse part of a run, which lies between the warm-up and the
    dense block at the end."""

    points: tuple[tuple[float, float], ...]
    """Places and the shares kept there. Place 0.0 is the first step behind the warm-up, and 1.0 the
    last one before the dense block at the end."""

    between: Between = "line"
    """`line`: the share goes straight from each point to the next. `steps`: it stays as it is up to
    the next point."""

    def __post_init__(self) -> None:
        refuse_knobs(self, self._rules)

    def _rules(self) -> list[Rule]:
        pairs = _pairs(self.points)
        places, shares = [place for place, _ in pairs], [share for _, share in pairs]
        is_within = places[:1] == [0.0] and max(places, default=0.0) <= 1.0
        return [
            (
                "points",
                len(pairs) >= 2 and len(pairs) == len(self.points),
                "must be two pairs of numbers or more, each a place and a share, as "
                "((0.0, 0.7), (1.0, 0.3))",
            ),
            (
                "points",
                is_within and all(a < b for a, b in pairwise(places)),
                "places must rise from 0.0 to 1.0 at most",
            ),
            ("points", all(map(_is_share, shares)), "shares must be in [1e-6, 1]"),
            ("between", self.between in get_args(Between), f"must be one of {get_args(Between)}"),
        ]

    def at(self, place: float) -> float:
        """Return the share kept at a place from 0 to 1."""
        number = bisect_right(self.points, (place, math.inf)) - 1
        (start, share), *after = self.points[number : number + 2]
        if not after or self.between == "steps":
            return share
        end, next_share = after[0]
        return share + (next_share - share) * (place - start) / (end - start)


KeepShare = float | MovingShare
"""A share of what a sparse step keeps: one for all of them, or one that moves."""


def share_rules(name: str, share: object) -> list[Rule]:
    """Return what a knob of type ``KeepShare`` must hold; a ``MovingShare`` has judged itself."""
    if isinstance(share, MovingShare):
        return []
    return [
        (name, is_number(share), "must be a number, or a MovingShare"),
        (name, _is_share(share), "must be in [1e-6, 1]"),
    ]


def share_at(share: KeepShare, place: float) -> float:
    """Return the share kept at a place of the sparse part, from 0 to 1."""
    return share.at(place) if isinstance(share, MovingShare) else share


def elides(share: KeepShare) -> bool:
    """Return whether the share is below 1 somewhere."""
    least = min(s for _, s in share.points) if isinstance(share, MovingShare) else share
    return least < 1.0


def _pairs(points: object) -> list[tuple[float, float]]:
    """Return those of the points that are pairs of numbers."""
    if not isinstance(points, tuple):
        return []
    return [p for p in points if isinstance(p, tuple) and len(p) == 2 and all(map(is_number, p))]


def _is_share(value: object) -> bool:
    # Less would round to no position at all: k = ceil(p * n - 1e-9).
    return isinstance(value, int | float) and 1e-6 <= value <= 1.0


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The dense and sparse steps of a run. Lengths are in optimizer steps; steps count from 0."""

    total_steps: int
    warmup_steps: int
    cycle_steps: int
    cycle_dense_steps: int
    final_dense_steps: int

    def is_dense(self, step: int) -> bool:
        """Return whether the step keeps every token: it is in the warm-up, the end block or the
        dense start of a cycle."""
        if step < self.warmup_steps or step >= self.total_steps - self.final_dense_steps:
            return True
        if self.cycle_steps == 0:
            return False
        return (step - self.warmup_steps) % self.cycle_steps < self.cycle_dense_steps

    def place(self, step: int) -> float:
        """Return where a step lies between the warm-up (0) and the dense block at the end (1)."""
        num_between = self.total_steps - self.final_dense_steps - self.warmup_steps
        return min(1.0, max(0.0, (step - self.warmup_steps) / max(1, num_between - 1)))

    def require_same(self, saved: Mapping[str, Any]) -> None:
        """Refuse, by ValueError, to go on with another schedule than the saved one."""
        for name, value in asdict(self).items():
            if saved[name] != value:
                raise ValueError(
                    f"{name} is {value} by this configuration, but {saved[name]} in the "
                    "checkpoint's run; resume with the same schedule"
                )


@dataclass(frozen=True, kw_only=True)
class Course:
    """How much of the answers, or of the images, each step of a run keeps."""

    schedule: Schedule
    share: KeepShare
    """What sparse steps keep."""

    weighs: bool = False
    """Whether sparse steps need scores though they keep everything."""

    def at(self, step: int) -> float:
        """Return the share that a step keeps; 1 if it is dense."""
        if self.schedule.is_dense(step):
            return 1.0
        return share_at(self.share, self.schedule.place(step))

    def chooses(self, step: int) -> bool:
        """Return whether the step ranks, or weighs, what the share is of."""
        return self.at(step) < 1.0 or (self.weighs and not self.schedule.is_dense(step))

    def ever_chooses(self, num_steps: int) -> bool:
        """Return whether one of the first ``num_steps`` steps chooses something."""
        schedule = self.schedule
        # Those before are dense; a run may have more steps than can be asked one by one.
        first = schedule.warmup_steps + min(schedule.cycle_dense_steps, schedule.cycle_steps)
        last = min(num_steps, schedule.total_steps - schedule.final_dense_steps)
        return any(map(self.chooses, range(first, last)))

    def expected_share(self, num_steps: int | None = None) -> float:
        """Return the mean over steps of the share kept.

        num_steps: how many steps, from the first; None is all of the schedule.
        """
        num_steps = self.schedule.total_steps if num_steps is None else num_steps
        return 1.0 - math.fsum(1.0 - self.at(step) for step in range(num_steps)) / num_steps


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """When answers and when images are elided, and how much; None is never."""

    answers: Course | None
    images: Course | None

    start: int = 0
    """The first step of both schedules. The steps before it are merged."""

    def is_merged(self, step: int) -> bool:
        """Return whether the step's slots are patches of tokens; then it elides nothing."""
        return step < self.start

    def chooses_answers(self, step: int) -> bool:
        step -= self.start
        return step >= 0 and self.answers is not None and self.answers.chooses(step)

    def chooses_images(self, step: int) -> bool:
        step -= self.start
        return step >= 0 and self.images is not None and self.images.chooses(step)

    def shares(self, step: int) -> tuple[float, float]:
        """Return the shares that a step keeps of the answers and of the images."""
        answers, images = self.answers, self.images
        step -= self.start
        return (
            1.0 if answers is None else answers.at(step),
            1.0 if images is None else images.at(step),
        )

    def is_dense(self, step: int) -> bool:
        """Return whether the step keeps every token, and each as it is."""
        chooses = self.chooses_answers(step) or self.chooses_images(step)
        return not (chooses or self.is_merged(step))

    def never_choosing(self, num_steps: int) -> list[str]:
        """Return of which no choice is made in the first ``num_steps`` steps, though one is to be:
        "answers", "images" or both."""
        courses = {"answers": self.answers, "images": self.images}
        length = num_steps - self.start
        return [k for k, one in courses.items() if one is not None and not one.ever_chooses(length)]

    def num_sparse(self, num_steps: int) -> int:
        """Return how many of the first ``num_steps`` steps elide or merge something."""
        return sum(not self.is_dense(step) for step in range(num_steps))
