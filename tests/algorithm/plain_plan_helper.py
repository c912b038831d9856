"""Selection by walking over each sample with lists and sets, and batches of every kind for it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from regate_ds.algorithm.batch import IGNORE, SampleKey, TokenBatch
from regate_ds.algorithm.plan import ElisionPlan

Beyond = dict[tuple[int, int], int]
"""By (row, position) of elidable image tokens: the place in the image's order, less those kept."""

OrderOf = Callable[[tuple[SampleKey, int], list[bool], int], list[int]]
"""(sample and number of the image, which of its tokens may be elided, how many of these are kept)
-> those that may be elided, numbered among themselves, in order."""


def wild_batch(rng: random.Random, *, images: bool = False) -> TokenBatch:
    """Any rows: samples of one token, without a label, all labels, labels at the first position.

    With ``images`` they lie anywhere: at the first position, under labels, touching, with other
    tokens inside, of one token.
    """
    num_rows, longest = rng.randrange(1, 4), 0
    rows = []
    for _ in range(num_rows):
        sizes = [rng.randrange(1, 14) for _ in range(rng.randrange(1, 4))]
        shares = [0.0, 0.2, 0.5, 1.0] if images else [0.0, 0.5, 0.8, 1.0]
        rows.append([_labels(size, shares, rng) for size in sizes])
        longest = max(longest, sum(sizes))
    longest += rng.choice([0, 0, 5])
    labels = torch.full((num_rows, longest), IGNORE)
    segment = torch.full((num_rows, longest), -1)
    for r, samples in enumerate(rows):
        flat = [y for sample in samples for y in sample]
        labels[r, : len(flat)] = torch.tensor(flat)
        segment[r, : len(flat)] = torch.tensor([s for s, x in enumerate(samples) for _ in x])
    keys = tuple(tuple((f"row{r}", s) for s in range(len(row))) for r, row in enumerate(rows))
    if not images:
        return TokenBatch(keys, segment, labels)
    image = torch.full((num_rows, longest), -1)
    for r, samples in enumerate(rows):
        flat = [n for sample in samples for n in _images(len(sample), rng)]
        image[r, : len(flat)] = torch.tensor(flat)
    return TokenBatch(keys, segment, labels, image)


def _images(size: int, rng: random.Random) -> list[int]:
    """The number of each position's image; new images begin at random, also next to others."""
    image, number, is_inside = [], -1, False
    share, gap = rng.choice([0.0, 0.7, 0.9]), rng.choice([0.0, 0.2])
    for _ in range(size):
        if rng.random() < 0.3:
            is_inside = rng.random() < share
            number += is_inside
        image.append(number if is_inside and rng.random() >= gap else -1)
    return image


def _labels(size: int, shares: list[float], rng: random.Random) -> list[int]:
    share = rng.choice(shares)
    return [rng.randrange(50) if rng.random() < share else IGNORE for _ in range(size)]


@dataclass(frozen=True)
class PlainSample:
    row: int
    positions: list[int]
    elidable: list[int]
    """Label positions but the first of the sample."""

    images: dict[int, list[int]]
    """Positions of each image's tokens, by its number."""


def samples_of(batch: TokenBatch) -> Iterator[PlainSample]:
    for r, row in enumerate(batch.segment_BT.tolist()):
        for s in range(max(row) + 1):
            positions = [t for t, segment in enumerate(row) if segment == s]
            labelled = [t for t in positions[1:] if int(batch.labels_BT[r, t]) != IGNORE]
            images: dict[int, list[int]] = {}
            for t in positions:
                if batch.image_BT is not None and (number := int(batch.image_BT[r, t])) >= 0:
                    images.setdefault(number, []).append(t)
            yield PlainSample(r, positions, labelled, images)


def plain_beyond(batch: TokenBatch, order_of: OrderOf, keep_share: float) -> Beyond:
    """What each image keeps, and in what order the rest would follow."""
    beyond: Beyond = {}
    keys = [key for row in batch.keys for key in row]
    for key, sample in zip(keys, samples_of(batch), strict=True):
        for number, tokens in sample.images.items():
            stays = {sample.positions[0], *sample.elidable}
            is_free = [t not in stays for t in tokens]
            free = [t for t in tokens if t not in stays]
            num_kept = math.ceil(keep_share * len(free) - 1e-9)
            for place, i in enumerate(order_of((key, number), is_free, num_kept)):
                beyond[sample.row, free[i]] = place - num_kept
    return beyond


def plain_kept(
    batch: TokenBatch,
    score_N: torch.Tensor,
    *,
    keep_share: float,
    align: str,
    multiple: int = 1,
    beyond: Beyond | None = None,
) -> tuple[list[list[int]], int]:
    """Kept positions of each row in reading order, and how many of them only fill its length."""
    ranked = Ranked(_score_of(batch, score_N), beyond or {})
    kept = _kept(batch, ranked, keep_share, align)
    num_filled = sum(_fill(batch, ranked, kept, multiple, {r}) for r in range(len(kept)))
    return [sorted(row) for row in kept], num_filled


def plain_ragged(
    batch: TokenBatch,
    score_N: torch.Tensor,
    *,
    keep_share: float,
    align: str,
    multiple: int,
    beyond: Beyond | None = None,
) -> tuple[list[list[int]], int]:
    """The same, where the length of all rows together is filled."""
    ranked = Ranked(_score_of(batch, score_N), beyond or {})
    kept = _kept(batch, ranked, keep_share, align)
    num_filled = _fill(batch, ranked, kept, multiple, set(range(len(kept))))
    return [sorted(row) for row in kept], num_filled


@dataclass(frozen=True)
class Ranked:
    """The scores of label positions, by (row, position), and the places of image tokens."""

    score: dict[tuple[int, int], float]
    beyond: Beyond


def _kept(batch: TokenBatch, ranked: Ranked, keep_share: float, align: str) -> list[set[int]]:
    kept: list[set[int]] = [set() for _ in batch.keys]
    for sample in samples_of(batch):
        stays = set(sample.positions) - set(sample.elidable)
        stays = {t for t in stays if ranked.beyond.get((sample.row, t), -1) < 0}
        kept[sample.row] |= stays | _hard(sample, ranked.score, keep_share, align)
    return kept


def _fill(
    batch: TokenBatch, ranked: Ranked, kept: list[set[int]], multiple: int, rows: set[int]
) -> int:
    """Add the best of what is left in these rows, up to the multiple; how many were added."""
    length = sum(len(kept[r]) for r in rows)
    samples = [s for s in samples_of(batch) if s.row in rows]
    left = [(s.row, t) for s in samples for t in s.elidable if t not in kept[s.row]]
    best = sorted(left, key=lambda at: (-ranked.score[at], at))
    elided = [at for at, places in ranked.beyond.items() if places >= 0 and at[0] in rows]
    best += sorted(elided, key=lambda at: (ranked.beyond[at], at))
    best = best[: math.ceil(length / multiple) * multiple - length]
    for r, t in best:
        kept[r].add(t)
    return len(best)


def _hard(sample: PlainSample, score: dict[tuple[int, int], float], share: float, align: str):
    order = sorted(sample.elidable, key=lambda t: (-score[sample.row, t], t))
    k = math.ceil(share * len(order) - 1e-9)
    if align == "predictor":
        return set(order[:k])
    if align == "both":
        return set(order[:k]) | {t + 1 for t in order[:k] if t + 1 in sample.elidable}
    holders = [t + 1 for t in order if t + 1 in sample.elidable]
    others = [t for t in order if t not in holders]
    return set((holders + others)[:k])


def _score_of(batch: TokenBatch, score_N: torch.Tensor) -> dict[tuple[int, int], float]:
    """Scores by (row, position): they come in reading order."""
    scores, found = iter(score_N.tolist()), {}
    for r, row in enumerate(batch.labels_BT.tolist()):
        for t, label in enumerate(row):
            if label != IGNORE:
                found[r, t] = next(scores)
    return found


def rows_of(plan: ElisionPlan) -> list[list[int]]:
    """Kept positions of each row, read off the packed rows."""
    pairs = zip(plan.kept_BK.tolist(), plan.segment_BK.tolist(), strict=True)
    return [[t for t, s in zip(*row, strict=True) if s >= 0] for row in pairs]
