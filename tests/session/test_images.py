"""Image tokens in a session: a schedule of their own, counts, resume, and what is refused."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
import torch

from regate_ds.algorithm.batch import IMAGE, TokenBatch
from regate_ds.algorithm.plan import ElisionPlan, StepPlan
from regate_ds.algorithm.rows import RowLayout
from regate_ds.images_config import ImagesConfig
from regate_ds.session import Regate
from regate_ds.stores.difficulty.indexed import DifficultyStore
from regate_ds.stores.values import Stores
from tests.algorithm.plain_plan_helper import rows_of, wild_batch
from tests.session.test_session import run_step
from tests.support.planning import config_of, fuse, plan_in
from tests.support.stores import RandomReference, index_of, read_difficulty

TOTAL_STEPS = 8
ANSWERS = {"warmup": 2, "final_dense_share": 0.25}
"""Steps 2 to 5 choose among answers."""

IMAGES = {"warmup": 1, "cycle_steps": 3, "cycle_dense_steps": 1, "final_dense_share": 0.0}
"""Steps 2, 3, 5 and 6 choose among image tokens."""


def window_of(seed: int, num_micro: int = 2) -> tuple[TokenBatch, ...]:
    rng, batches = random.Random(seed), []
    while len(batches) < num_micro:
        batch = wild_batch(rng, images=True)
        keys = tuple(
            tuple((f"{seed}-{len(batches)}-{name}", n) for name, n in row) for row in batch.keys
        )
        if bool(batch.is_label_BT.any()) and int((batch.kind_BT == IMAGE).sum()) > 8:
            batches.append(replace(batch, keys=keys))
    return tuple(batches)


WINDOWS = [window_of(seed) for seed in range(2)]
INDEX = index_of(batch for window in WINDOWS for batch in window)


def made(rows: RowLayout | None = None, **knobs) -> tuple[Regate, DifficultyStore]:
    chosen = {"images": {"keep_share": 0.3, "schedule": IMAGES}, "schedule": ANSWERS, **knobs}
    store = DifficultyStore(INDEX)
    stores = Stores(RandomReference(INDEX), store)
    config = config_of(keep_share=0.4, **chosen)
    return Regate(config, stores, total_steps=TOTAL_STEPS, rows=rows), store


def positions(step: StepPlan) -> list[tuple[int, list[list[int]]]]:
    return [(one.num_filled, rows_of(one)) for one in step.micro]


def test_answers_and_images_are_elided_in_the_steps_of_their_own_schedules():
    session, store = made(rows=RowLayout(multiple=4))
    chosen = []
    for number in range(TOTAL_STEPS):
        window = WINDOWS[number % 2]
        keys = [[key for row in batch.keys for key in row] for batch in window]
        before = [read_difficulty(store, each) for each in keys]
        step = run_step(session, *window)
        answers, images = 2 <= number < 6, number in (2, 3, 5, 6)
        assert step.is_dense == (not answers and not images)
        for batch, each, old_N, plan in zip(window, keys, before, step.micro, strict=True):
            score_N = fuse(RandomReference(INDEX).read(each), old_N)
            wanted = planned_alone(batch, score_N, answers=answers, images=images, step=number)
            if not step.is_dense:
                assert rows_of(plan) == rows_of(wanted)
                assert plan.num_filled == wanted.num_filled
        check_counts(step, answers=answers, images=images)
        chosen.append((answers, images))
    assert set(chosen) == {(a, b) for a in (False, True) for b in (False, True)}


def planned_alone(batch: TokenBatch, score_N, *, answers: bool, images: bool, step: int):
    return plan_in(
        RowLayout(multiple=4),
        batch,
        score_N,
        keep_share=0.4 if answers else 1.0,
        align="predictor",
        images=ImagesConfig(keep_share=0.3) if images else None,
        step=step,
    )


def check_counts(step: StepPlan, *, answers: bool, images: bool) -> None:
    counts = step.counts
    assert 0 < counts["image_total"] < counts["tokens_total"]
    assert (counts["image_kept"] < counts["image_total"]) == images
    assert (counts["answer_kept"] < counts["answer_total"]) == answers
    elided = counts["image_total"] - counts["image_kept"]
    elided += counts["answer_total"] - counts["answer_kept"]
    assert counts["tokens_total"] - counts["tokens_kept"] == elided


def test_shares_that_move_keep_in_each_step_what_fixed_shares_keep_there():
    schedule = {"warmup": 1, "final_dense_share": 1 / TOTAL_STEPS}

    def opened(answers, images) -> Regate:
        config = config_of(
            score="reference", schedule=schedule, keep_share=answers, images={"keep_share": images}
        )
        return Regate(config, Stores(RandomReference(INDEX)), total_steps=TOTAL_STEPS)

    falls = {"points": [[0.0, 0.7], [1.0, 0.2]]}
    jumps = {"points": [[0.0, 1.0], [0.4, 0.25]], "between": "steps"}
    moving, kept = opened(falls, jumps), set()
    for number, share in enumerate([1.0, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 1.0]):
        # Places 0, .2, .4, ...: the images' share jumps in the third sparse step.
        fixed = opened(share, 0.25 if number in range(3, 7) else 1.0)
        fixed.step = number
        found, wanted = run_step(moving, *WINDOWS[0]), run_step(fixed, *WINDOWS[0])
        assert positions(found) == positions(wanted)
        assert found.counts == wanted.counts
        assert moving.is_dense(number) == found.is_dense == (share == 1.0)
        kept.add((found.counts["answer_kept"], found.counts["image_kept"]))
    assert len(kept) == 7


def test_without_answers_to_choose_images_need_no_store():
    config = config_of(keep_share=1.0, images={"keep_share": 0.3, "schedule": IMAGES})
    session = Regate(config, Stores(), total_steps=TOTAL_STEPS)
    steps = [run_step(session, *WINDOWS[0]) for _ in range(TOTAL_STEPS)]
    assert [number for number, step in enumerate(steps) if not step.is_dense] == [2, 3, 5, 6]
    assert all(step.counts["answer_kept"] == step.counts["answer_total"] for step in steps)
    # Drawn anew in each step.
    assert positions(steps[2]) != positions(steps[3])


def test_images_follow_the_schedule_of_answers_unless_they_have_one():
    session, _ = made(images={"keep_share": 0.3})
    for number in range(TOTAL_STEPS):
        step = run_step(session, *WINDOWS[0])
        check_counts(step, answers=2 <= number < 6, images=2 <= number < 6)


def test_mlp_only_counts_what_elide_does_and_pads_the_micro_batch_as_a_whole():
    mlp_only, _ = made(execution="mlp_only")
    elide, _ = made()
    for number in range(4):
        found, wanted = (run_step(one, *WINDOWS[0]) for one in (mlp_only, elide))
        if not found.is_dense:
            assert {**found.counts, "padded": 0} == {**wanted.counts, "padded": 0}
            assert found.counts["padded"] == 0
            check_counts(found, answers=2 <= number < 6, images=number in (2, 3))
    mlp_only, _ = made(execution="mlp_only", token_multiple=512)
    step = [run_step(mlp_only, *WINDOWS[0]) for _ in range(3)][-1]
    # More than there is: all stay, and the rest is padding.
    assert step.counts["tokens_kept"] == step.counts["tokens_total"]
    assert step.counts["padded"] == sum(-plan.num_kept % 512 for plan in step.micro)


def test_backward_only_counts_what_elide_keeps_and_every_label():
    backward_only, _ = made(execution="backward_only")
    elide, _ = made(execution="elide")
    # In their first sparse step both have the same scores; later, losses of other positions.
    for _ in range(3):
        found, wanted = (run_step(one, *WINDOWS[0]) for one in (backward_only, elide))
    assert not found.is_dense
    every = {"answer_kept": wanted.counts["answer_total"]}
    assert found.counts == {**wanted.counts, **every}
    assert found.num_targets_global == wanted.counts["answer_total"] > wanted.counts["answer_kept"]


def test_random_ltd_needs_no_store_keeps_its_share_and_resumes():
    knobs = {"execution": "random_ltd", "score": "random", "last_layer": 3, "schedule": ANSWERS}
    sessions = [
        Regate(config_of(keep_share=0.4, **knobs), Stores(), total_steps=TOTAL_STEPS)
        for _ in range(2)
    ]
    whole = [run_step(sessions[0], *WINDOWS[0]) for _ in range(TOTAL_STEPS)]
    assert [number for number, one in enumerate(whole) if not one.is_dense] == [2, 3, 4, 5]
    for _ in range(3):
        run_step(sessions[1], *WINDOWS[0])
    resumed = Regate(config_of(keep_share=0.4, **knobs), Stores(), total_steps=TOTAL_STEPS)
    resumed.load_state_dict(sessions[1].state_dict())
    wanted = {rows_of(one)[0][0] for step in whole for one in step.micro}
    assert wanted == {0}
    for step in whole[3:]:
        found = run_step(resumed, *WINDOWS[0])
        assert found.counts == step.counts
        for mine, theirs in zip(found.micro, step.micro, strict=True):
            assert list(map(rows_of, mine.sets)) == list(map(rows_of, theirs.sets))
    sizes = [
        int((batch.sample_BT == sample).sum())
        for batch in WINDOWS[0]
        for sample in range(len(batch.flat_keys))
    ]
    kept = sum(math.ceil(0.4 * size - 1e-9) for size in sizes)
    assert whole[2].counts["tokens_kept"] == kept < whole[2].counts["tokens_total"]


def test_the_length_of_random_ltd_grows_to_all_and_stays_there():
    grows = {"points": [[0.0, 0.25], [0.5, 1.0]]}
    knobs = {"execution": "random_ltd", "score": "random", "last_layer": 3}
    never = {"warmup": 0, "final_dense_share": 0.0}
    config = config_of(keep_share=grows, schedule=never, **knobs)
    session = Regate(config, Stores(), total_steps=9)
    steps = [run_step(session, *WINDOWS[0]) for _ in range(9)]
    kept = [step.counts["tokens_kept"] for step in steps]
    assert kept[:5] == sorted(set(kept))
    assert kept[4:] == [steps[0].counts["tokens_total"]] * 5
    assert [step.is_dense for step in steps] == [False] * 4 + [True] * 5


def test_the_plans_of_images_kept_whole_are_those_without_images():
    plans: list[list[ElisionPlan]] = []
    for images in ({"keep_share": 1.0, "schedule": IMAGES}, {}):
        session, _ = made(images=images)
        windows = [
            [replace(b, image_BT=b.image_BT if images else None) for b in w] for w in WINDOWS
        ]
        steps = [run_step(session, *windows[number % 2]) for number in range(TOTAL_STEPS)]
        plans.append([one for step in steps for one in step.micro])
    for mine, theirs in zip(*plans, strict=True):
        for name, value in vars(mine).items():
            other = getattr(theirs, name)
            same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
            assert same, name


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_goes_on_in_both_schedules_as_if_it_had_never_stopped(stop: int, tmp_path):
    whole, whole_store = made()
    steps = [run_step(whole, *WINDOWS[number % 2]) for number in range(TOTAL_STEPS)]
    begun, begun_store = made()
    for number in range(stop):
        run_step(begun, *WINDOWS[number % 2])
    begun_store.save(tmp_path)
    rest, rest_store = made()
    rest.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    rest_store.load(tmp_path)
    for number in range(stop, TOTAL_STEPS):
        step = run_step(rest, *WINDOWS[number % 2])
        assert positions(step) == positions(steps[number])
        assert step.counts == steps[number].counts
    keys = [key for window in WINDOWS for batch in window for key in batch.flat_keys]
    assert torch.equal(read_difficulty(rest_store, keys), read_difficulty(whole_store, keys))


@pytest.mark.parametrize("images", [{}, {"schedule": {**IMAGES, "warmup": 3}}])
def test_a_checkpoint_of_another_schedule_of_images_is_refused(images: dict):
    saved, other = (
        made()[0],
        made(images={"keep_share": 0.3, **images})[0],
    )
    for mine, theirs in ((saved, other), (other, saved)):
        with pytest.raises(ValueError, match="images.schedule is .* but .* in the checkpoint's"):
            mine.load_state_dict(json.loads(json.dumps(theirs.state_dict())))


def test_a_batch_that_does_not_tell_its_images_is_refused_before_anything_is_planned():
    session, _ = made(images={"keep_share": 0.3, "schedule": {"warmup": 0}})
    with pytest.raises(ValueError, match=r"does not tell .* images \(image_BT=None\); give"):
        session.plan_step([replace(WINDOWS[0][0], image_BT=None)])
    assert run_step(session, *WINDOWS[0]).step == 0
