"""The order of an image's tokens by each ranking, against loops over tokens."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from regate_ds.algorithm.rankings.attention import AttentionOrder
from regate_ds.algorithm.rankings.diversity import DiversityOrder
from regate_ds.algorithm.rankings.mixed import MixedOrder
from regate_ds.algorithm.rankings.pixels import PixelOrder
from regate_ds.algorithm.rankings.random import RandomOrder
from regate_ds.algorithm.rankings.ranking import ImageKey, Picture, Ranking, RankingInputs
from regate_ds.algorithm.rankings.stride import StrideOrder

KEYS: list[ImageKey] = [(("a", 0), 0), (("a", 0), 1), (("b", 0), 0), (("a", 1), 0)]
SIZES = [12, 5, 1, 12]


def orders(
    ranking: Ranking,
    which: list[int],
    *,
    step: int = 0,
    kept: list[int] | None = None,
    stored: list[list[int]] | None = None,
) -> list[list[int]]:
    """The tokens of these images in order."""
    sizes = [SIZES[i] for i in which]
    place_M = ranking(
        RankingInputs(
            step=step,
            keys=tuple(KEYS[i] for i in which),
            sizes_I=torch.tensor(sizes),
            num_kept_I=torch.tensor(kept or [math.ceil(size / 2) for size in sizes]),
            orders=None if stored is None else [torch.tensor(order) for order in stored],
        )
    )
    found = [part.argsort().tolist() for part in place_M.split(sizes)]
    assert [sorted(order) for order in found] == [list(range(size)) for size in sizes]
    return found


def test_a_draw_depends_on_seed_sample_image_and_step_alone():
    whole = orders(RandomOrder(), [0, 1, 2, 3])
    assert whole == [orders(RandomOrder(), [i])[0] for i in range(4)]
    assert whole[::-1] == orders(RandomOrder(), [3, 2, 1, 0])
    # The number kept is no part of the draw, so that a smaller share keeps a part of a larger one.
    assert whole == orders(RandomOrder(), [0, 1, 2, 3], kept=[1, 1, 1, 1])
    others = [orders(RandomOrder(seed=1), [0])[0], orders(RandomOrder(), [0], step=1)[0], whole[3]]
    assert whole[0] not in others
    assert len({tuple(order) for order in others}) == 3


def test_images_of_one_sample_are_drawn_apart():
    same_size = RankingInputs(
        step=0,
        keys=((("a", 0), 0), (("a", 0), 1)),
        sizes_I=torch.tensor([9, 9]),
        num_kept_I=torch.tensor([3, 3]),
    )
    first, second = RandomOrder()(same_size).split(9)
    assert not torch.equal(first, second)


def test_over_many_steps_each_token_is_drawn_equally_often():
    num_steps, num_kept = 3000, 4
    drawn = Counter(
        token
        for step in range(num_steps)
        for token in orders(RandomOrder(seed=2), [0], step=step)[0][:num_kept]
    )
    mean = num_steps * num_kept / SIZES[0]
    deviation = math.sqrt(mean * (1 - num_kept / SIZES[0]))
    assert all(abs(drawn[token] - mean) < 4 * deviation for token in range(SIZES[0]))


@pytest.mark.parametrize("num_kept", range(13))
def test_a_stride_spaces_evenly_and_moves_by_one_with_each_step(num_kept: int):
    at_start = sorted(orders(StrideOrder(), [0], kept=[num_kept])[0][:num_kept])
    gaps = [b - a for a, b in zip(at_start, [*at_start[1:], *(t + 12 for t in at_start[:1])])]
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
    for step in (1, 5, 12, 1000):
        order = orders(StrideOrder(), [0], step=step, kept=[num_kept])[0]
        assert sorted(order[:num_kept]) == sorted((t + step) % 12 for t in at_start)
        assert order[num_kept:] == sorted(order[num_kept:])


STORED = [[11, 3, 7, 0, 1, 2, 4, 5, 6, 8, 9, 10], [4, 0, 1, 3, 2]]


@pytest.mark.parametrize("ranking", [PixelOrder(), DiversityOrder(), AttentionOrder()])
def test_a_stored_order_is_followed_in_every_step(ranking: Ranking):
    assert orders(ranking, [0, 1], stored=STORED, step=1) == STORED
    assert orders(ranking, [0, 1], stored=STORED, step=2) == STORED


@pytest.mark.parametrize(("share", "num_first"), [(0.0, [0, 0]), (0.5, [3, 2]), (1.0, [6, 3])])
def test_mixed_takes_a_share_of_the_kept_from_the_stored_order_and_draws_the_rest(share, num_first):
    ranking = MixedOrder(by="pixels", ranked_share=share, seed=3)
    for step in (0, 1):
        found = orders(ranking, [0, 1], stored=STORED, step=step)
        drawn = orders(RandomOrder(seed=3), [0, 1], step=step)
        for order, best, free, num in zip(found, STORED, drawn, num_first, strict=True):
            assert order == best[:num] + [t for t in free if t not in best[:num]]


def test_pixels_puts_patches_of_high_variance_first():
    pixels_nP = torch.tensor([[3.0, 3.0], [0.0, 4.0], [1.0, 2.0], [4.0, 0.0], [2.0, 1.0]])
    order = PixelOrder().order(Picture(pixels_nP=pixels_nP), 5).tolist()
    variances = [sum((x - sum(row) / 2) ** 2 for x in row) / 2 for row in pixels_nP.tolist()]
    assert order == sorted(range(5), key=lambda token: (-variances[token], token))
    assert PixelOrder().order(Picture(pixels_nP=pixels_nP), 2).tolist() == order[:2]


def exact_features(num_tokens: int, rng: random.Random) -> Tensor:
    """Features whose distances single precision has exactly, with duplicates and many ties."""
    rows = []
    for _ in range(num_tokens):
        row = [0.0] * 6
        for axis in rng.sample(range(6), rng.choice([1, 4])):
            row[axis] = rng.choice([-1.0, 1.0]) * rng.choice([0.5, 1.0, 4.0])
        length = max(map(abs, row))
        rows.append([math.copysign(length, x) if x else 0.0 for x in row])
    return torch.tensor(rows)


def plain_diversity(features: list[list[float]], num_first: int) -> list[int]:
    """O(n^3): at each choice the distances of every token to every chosen one."""

    def distance(i: int, j: int) -> float:
        a, b = features[i], features[j]
        return 1 - sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b)

    chosen: list[int] = []
    while len(chosen) < num_first:
        left = [i for i in range(len(features)) if i not in chosen]
        value = {
            i: min((distance(i, j) for j in chosen or range(len(features)) if j != i), default=0)
            for i in left
        }
        chosen.append(min(left, key=lambda i: (-value[i], i)))
    return chosen


def test_diversity_is_the_max_min_choice_of_a_plain_loop():
    rng = random.Random(4)
    for num_tokens in (1, 2, 3, 9, 16, 16, 16, 25):
        features_nF = exact_features(num_tokens, rng)
        for num_first in {0, 1, num_tokens // 2, num_tokens}:
            found = DiversityOrder().order(Picture(features_nF=features_nF), num_first).tolist()
            assert found == plain_diversity(features_nF.double().tolist(), num_first)


def test_the_blocks_of_diversity_change_nothing(monkeypatch):
    features_nF = exact_features(23, random.Random(5))
    whole = DiversityOrder().order(Picture(features_nF=features_nF), 23)
    monkeypatch.setattr("regate_ds.algorithm.rankings.diversity._BLOCK", 4)
    assert torch.equal(DiversityOrder().order(Picture(features_nF=features_nF), 23), whole)


def test_diversity_takes_a_copy_last():
    features_nF = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert DiversityOrder().order(Picture(features_nF=features_nF), 4).tolist() == [2, 0, 3, 1]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_attention_takes_turns_between_all_layers_and_the_middle_one(share: float):
    rng = random.Random(6)
    for num_layers in (1, 2, 5):
        layers = [[rng.randrange(5) / 4 for _ in range(11)] for _ in range(num_layers)]
        total = [sum(layer[t] for layer in layers) for t in range(11)]
        middle = layers[num_layers // 2]
        wanted: list[int] = []
        for num in range(1, 12):
            num_total = math.ceil(share * num - 1e-9)
            by = total if num_total > math.ceil(share * (num - 1) - 1e-9) else middle
            left = [t for t in range(11) if t not in wanted]
            wanted.append(min(left, key=lambda t: (-by[t], t)))
        picture = Picture(attention_Ln=torch.tensor(layers))
        ranking = AttentionOrder(contribution_share=share)
        for num_first in (0, 1, 4, 11):
            assert ranking.order(picture, num_first).tolist() == wanted[:num_first]
