"""Which image tokens a plan keeps, against a walk over each image, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch

from regate_ds.algorithm.batch import (
    IGNORE,
    IMAGE,
    TokenBatch,
    join_images,
    number_images,
    starts_segment,
)
from regate_ds.algorithm.counts import COUNTS, count_step
from regate_ds.algorithm.executions.mlp_only import MlpOnly
from regate_ds.algorithm.images import beyond_kept
from regate_ds.algorithm.plan import ElisionPlan, plan_dense
from regate_ds.algorithm.rankings.diversity import DiversityOrder
from regate_ds.algorithm.rankings.mixed import MixedOrder
from regate_ds.algorithm.rankings.random import RandomOrder
from regate_ds.algorithm.rankings.ranking import ImageKey, Ranking, RankingInputs
from regate_ds.algorithm.rankings.stride import StrideOrder
from regate_ds.algorithm.rows import RowLayout
from regate_ds.algorithm.scores.random import Random
from regate_ds.config import RegateConfig
from regate_ds.images_config import ImagesConfig
from regate_ds.session import Regate
from regate_ds.stores.values import Stores
from tests.algorithm.plain_plan_helper import (
    Beyond,
    plain_beyond,
    plain_kept,
    plain_ragged,
    rows_of,
    samples_of,
    wild_batch,
)
from tests.support.planning import plan_in

STEP = 3
RANKINGS = [RandomOrder(seed=5), StrideOrder(), DiversityOrder(), MixedOrder(ranked_share=0.4)]
PADDED, RAGGED = RowLayout(multiple=4), RowLayout(row_format="ragged", multiple=8)
BY_SAMPLE = RowLayout(row_format="ragged", multiple=8, sample_multiple=4)


def given_order(key: ImageKey, size: int) -> list[int]:
    """A stored order that a test has made up."""
    order = list(range(size))
    random.Random(f"{key}").shuffle(order)
    return order


def read_orders(keys: Sequence[ImageKey], sizes: Sequence[int]) -> list[torch.Tensor]:
    return [torch.tensor(given_order(*pair)) for pair in zip(keys, sizes, strict=True)]


def plain_order(ranking: Ranking, key: ImageKey, is_free: list[bool], num_kept: int) -> list[int]:
    """The free tokens, numbered among themselves, in order. A draw is the ranking's own, of the
    image alone."""
    size = sum(is_free)
    if isinstance(ranking, StrideOrder):
        first = [(i * size // num_kept + STEP) % size for i in range(num_kept)]
        return first + [token for token in range(size) if token not in first]
    inputs = RankingInputs(
        step=STEP,
        keys=(key,),
        sizes_I=torch.tensor([size]),
        num_kept_I=torch.tensor([num_kept]),
    )
    if isinstance(ranking, RandomOrder):
        return ranking(inputs).argsort().tolist()
    stored = [sum(is_free[:i]) for i in given_order(key, len(is_free)) if is_free[i]]
    if isinstance(ranking, DiversityOrder):
        return stored
    assert isinstance(ranking, MixedOrder)
    best = stored[: -(-num_kept * 4 // 10)]
    drawn = RandomOrder(seed=ranking.seed)(inputs).argsort().tolist()
    return best + [token for token in drawn if token not in best]


def plain_places(batch: TokenBatch, ranking: Ranking, share: float) -> Beyond:
    return plain_beyond(batch, partial(plain_order, ranking), share)


def scores(batch: TokenBatch, rng: random.Random) -> torch.Tensor:
    return torch.tensor([rng.randrange(4) / 3 for _ in range(int(batch.is_label_BT.sum()))])


def planned(batch: TokenBatch, score_N: torch.Tensor, images: ImagesConfig, rows: RowLayout, **how):
    knobs = {"keep_share": 0.4, "align": "predictor", "step": STEP, "read_orders": read_orders}
    return plan_in(rows, batch, score_N, images=images, **{**knobs, **how})


@pytest.mark.parametrize("ranking", RANKINGS, ids=lambda ranking: type(ranking).__name__)
@pytest.mark.parametrize("rows", [RowLayout(), PADDED, RAGGED, BY_SAMPLE])
def test_the_plan_keeps_what_a_plain_walk_over_each_image_keeps(ranking: Ranking, rows: RowLayout):
    rng = random.Random(f"{ranking} {rows}")
    for _ in range(24):
        batch, image_share = wild_batch(rng, images=True), rng.choice([1e-6, 0.3, 0.5, 0.9])
        score_N, share = scores(batch, rng), rng.choice([0.3, 1.0])
        align = rng.choice(["predictor", "target", "both"])
        images = ImagesConfig(keep_share=image_share, ranking=ranking)
        plan = planned(batch, score_N, images, rows, keep_share=share, align=align)
        by_walk = plain_kept if rows.fills_rows else plain_ragged
        kept, num_filled = by_walk(
            batch,
            score_N,
            keep_share=share,
            align=align,
            multiple=rows.fill_multiple,
            beyond=plain_places(batch, ranking, image_share),
        )
        assert (rows_of(plan), plan.num_filled) == (kept, num_filled)
        assert_first_positions_stay(plan, batch)
        assert counted(batch, plan) == count_plainly(batch, kept)


@pytest.mark.parametrize("rows", [RowLayout(), PADDED], ids=lambda rows: str(rows.multiple))
def test_shorter_rows_take_further_image_tokens_where_padding_would_lie(rows: RowLayout):
    rng = random.Random(f"{rows}")
    num_levelled = 0
    for _ in range(40):
        batch, image_share = wild_batch(rng, images=True), rng.choice([1e-6, 0.3, 0.5])
        score_N, ranking = scores(batch, rng), rng.choice(RANKINGS)
        images = ImagesConfig(keep_share=image_share, ranking=ranking)
        how = {"align": rng.choice(["predictor", "both"])}
        plan = planned(batch, score_N, replace(images, fill_rows=True), rows, **how)
        plain = planned(batch, score_N, images, rows, **how)
        kept, num_filled = plain_level(rows_of(plain), plain_places(batch, ranking, image_share))
        assert rows_of(plan) == kept
        assert plan.num_filled == plain.num_filled + num_filled
        assert plan.num_slots == plain.num_slots
        assert torch.equal(plan.label_position_L, plain.label_position_L)
        num_levelled += num_filled
    assert num_levelled > 10


def plain_level(kept: list[list[int]], beyond: Beyond) -> tuple[list[list[int]], int]:
    """Add to each row, one by one, the next token of its images until it is as long as the longest
    or has none left."""
    longest, num_added = max(map(len, kept)), 0
    levelled = [set(row) for row in kept]
    for (row, t), _ in sorted(beyond.items(), key=lambda one: (one[1], one[0])):
        if t not in levelled[row] and len(levelled[row]) < longest:
            levelled[row].add(t)
            num_added += 1
    return [sorted(row) for row in levelled], num_added


def test_rows_are_not_filled_where_nothing_could_be():
    with pytest.raises(ValueError, match="fill_rows=True: needs a keep_share below 1"):
        ImagesConfig(fill_rows=True)
    images = ImagesConfig(keep_share=0.5, fill_rows=True)
    for config, rows in (
        (RegateConfig(images=images, score=Random()), RAGGED),
        (RegateConfig(images=images, score=Random(), execution=MlpOnly()), None),
    ):
        with pytest.raises(ValueError, match="fill_rows=True: kept tokens lie in ragged rows"):
            Regate(config, Stores(), total_steps=9, rows=rows)


def assert_first_positions_stay(plan: ElisionPlan, batch: TokenBatch) -> None:
    first = starts_segment(batch.segment_BT).flatten().nonzero().flatten().tolist()
    assert set(first) <= set(plan.position_R.tolist())


def counted(batch: TokenBatch, plan: ElisionPlan) -> tuple[int, int]:
    counts = dict(zip(COUNTS, count_step([batch], [plan], lambda _: 0), strict=True))
    return counts["image_total"], counts["image_kept"]


def count_plainly(batch: TokenBatch, kept: list[list[int]]) -> tuple[int, int]:
    found = [
        (sample.row, t)
        for sample in samples_of(batch)
        for tokens in sample.images.values()
        for t in tokens
        if t != sample.positions[0] and t not in sample.elidable
    ]
    return len(found), sum(t in kept[row] for row, t in found)


def test_images_that_are_kept_whole_change_no_plan():
    rng = random.Random(1)
    for rows in (PADDED, RAGGED, BY_SAMPLE) * 8:
        batch = wild_batch(rng, images=True)
        score_N = scores(batch, rng)
        how = {"keep_share": 0.4, "align": "both"}
        before = plan_in(rows, replace(batch, image_BT=None), score_N, **how)
        for images in (None, ImagesConfig(keep_share=1.0)):
            assert_same(plan_in(rows, batch, score_N, images=images, **how), before)
        assert_same(plan_dense(batch), plan_dense(replace(batch, image_BT=None)))


def assert_same(plan: ElisionPlan, other: ElisionPlan) -> None:
    for name, value in vars(plan).items():
        found = getattr(other, name)
        same = torch.equal(value, found) if isinstance(value, torch.Tensor) else value == found
        assert same, name


def test_a_position_that_is_image_and_label_is_a_label():
    batch = TokenBatch(
        ((("set", 0),),),
        torch.zeros(1, 6, dtype=torch.int64),
        torch.tensor([[IGNORE, IGNORE, IGNORE, 5, 6, IGNORE]]),
        torch.tensor([[0, 0, 0, 0, -1, -1]]),
    )
    assert (batch.kind_BT == IMAGE).tolist() == [[False, True, True, False, False, False]]
    # One of two image tokens, the harder label, and what is neither.
    plan = planned(batch, torch.tensor([2.0, 1.0]), ImagesConfig(keep_share=0.5), RowLayout())
    assert {0, 3, 5} < set(rows_of(plan)[0])
    assert plan.num_kept == 4


@pytest.mark.parametrize("ranking", RANKINGS, ids=lambda ranking: type(ranking).__name__)
def test_a_batch_without_an_image_is_planned(ranking: Ranking):
    batch = wild_batch(random.Random(0))
    batch = replace(batch, image_BT=torch.full_like(batch.labels_BT, -1))
    images = ImagesConfig(keep_share=0.1, ranking=ranking)
    score_N = torch.rand(int(batch.is_label_BT.sum()))
    plan = planned(batch, score_N, images, PADDED)
    assert_same(plan, plan_in(PADDED, batch, score_N, keep_share=0.4, align="predictor"))


def test_a_batch_that_does_not_tell_its_images_is_refused():
    batch = wild_batch(random.Random(0))
    with pytest.raises(ValueError, match=r"\(image_BT=None\); give image_BT in its TokenBatch"):
        beyond_kept(RandomOrder(), batch, keep_share=0.5, step=0)


ONE_IMAGE = TokenBatch(
    ((("set", 7),),),
    torch.zeros(1, 5, dtype=torch.int64),
    torch.tensor([[IGNORE, IGNORE, IGNORE, IGNORE, 5]]),
    torch.tensor([[-1, 2, 2, 2, -1]]),
)


@dataclass(frozen=True)
class Gives:
    """A ranking that gives whatever a test wants."""

    what: Any
    stored: str | None = None

    def __call__(self, inputs: RankingInputs) -> Any:
        return self.what


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (torch.tensor([0, 1]), r"^Gives returned torch.int64 \(2,\); it must .* shape \(3,\)$"),
        (torch.tensor([0.0, 1.0, 2.0]), r"^Gives returned torch.float32 \(3,\)"),
        ([0, 1, 2], "^Gives returned list"),
        (torch.tensor([0, 1, 1]), r"^Gives gave image \(\('set', 7\), 2\) places that are not 0"),
        (torch.tensor([1, 2, 3]), "places that are not 0 to 2, each once"),
        (torch.tensor([True, False, True]), "places that are not 0 to 2, each once"),
    ],
)
def test_a_ranking_that_returns_no_permutation_is_refused_by_name(what: Any, message: str):
    with pytest.raises(ValueError, match=message):
        beyond_kept(Gives(what), ONE_IMAGE, keep_share=0.5, step=0)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.tensor([[False, True, True, True, False]]), "image_BT is torch.bool, up to True"),
        (torch.tensor([[-1, 1 << 62, 0, 0, -1]]), f"image_BT is torch.int64, up to {1 << 62}"),
        (torch.tensor([[0, 0]]), "differ in shape"),
    ],
)
def test_what_numbers_no_images_is_refused(image: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        replace(ONE_IMAGE, image_BT=image)


def test_a_stored_share_of_a_mixed_order_counts_tokens_that_may_be_elided():
    # The whole sample is one image: its first position stays, and is first in the stored order.
    batch = TokenBatch(
        ((("set", 0),),),
        torch.zeros(1, 8, dtype=torch.int64),
        torch.full((1, 8), IGNORE),
        torch.zeros(1, 8, dtype=torch.int64),
    )
    for step in range(20):
        beyond_BT = beyond_kept(
            MixedOrder(ranked_share=1.0),
            batch,
            keep_share=0.5,
            step=step,
            read_orders=lambda *_: [torch.arange(8)],
        )
        assert (beyond_BT[0, 1:] < 0).nonzero().flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("order", [[0, 1, 1], [0, 1], [1, 2, 3], [-1, 0, 1]])
@pytest.mark.parametrize("ranking", [DiversityOrder(), MixedOrder()], ids=["stored", "mixed"])
def test_a_stored_order_that_is_no_permutation_is_refused_by_name(order, ranking: Ranking):
    message = rf"order of image \(\('set', 7\), 2\) in the store .*it has {len(order)};"
    with pytest.raises(ValueError, match=message):
        beyond_kept(
            ranking, ONE_IMAGE, keep_share=0.5, step=0, read_orders=lambda *_: [torch.tensor(order)]
        )


def test_images_are_numbered_by_their_lengths_where_they_touch_and_across_rows():
    is_image_BT = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()
    numbered = number_images(is_image_BT, [1, 2, 1, 2])
    assert numbered.tolist() == [[-1, 0, 1, -1, 1, 2], [-1] * 6, [0, 0, -1, -1, -1, -1]]
    assert number_images(torch.zeros(2, 3).bool(), []).tolist() == [[-1] * 3] * 2


def test_images_anywhere_are_numbered_as_a_walk_numbers_them():
    rng = random.Random(8)
    for _ in range(40):
        rows, lengths, wanted = [], ([], []), []
        for _ in range(3):
            kinds, numbers = [], []
            for number in range(rng.randrange(4)):
                kind, size = rng.randrange(2), rng.randrange(1, 4)
                lengths[kind].append(size)
                # Images touch, or text or separators lie between and inside them.
                for _ in range(size):
                    gap = rng.choice([0, 0, 1])
                    kinds += [-1] * gap + [kind]
                    numbers += [-1] * gap + [number]
            rows.append(kinds + [-1] * (32 - len(kinds)))
            wanted.append(numbers + [-1] * (32 - len(numbers)))
        kind_BT = torch.tensor(rows)
        numbered = [number_images(kind_BT == kind, lengths[kind]) for kind in range(2)]
        assert join_images(numbered).tolist() == wanted


def test_images_of_several_kinds_are_numbered_in_reading_order():
    first = torch.tensor([[0, -1, 1, 1, -1, -1], [-1, 0, 0, -1, 1, -1]])
    second = torch.tensor([[-1, 0, -1, -1, 1, 1], [0, -1, -1, -1, -1, -1]])
    joined = join_images([first, second]).tolist()
    assert joined == [[0, 1, 2, 2, 3, 3], [0, 1, 1, -1, 2, -1]]
    assert join_images([first]).tolist() == first.tolist()
