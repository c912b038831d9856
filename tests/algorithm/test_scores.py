"""Scores: what each makes of its inputs, and that it depends on nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from regate_ds.algorithm.scores.excess_loss import ExcessLoss
from regate_ds.algorithm.scores.random import Random
from regate_ds.algorithm.scores.score import ScoreInputs
from regate_ds.algorithm.scores.table import SCORES
from regate_ds.config import RegateConfig
from regate_ds.session import Regate
from regate_ds.stores.difficulty.indexed import DifficultyStore
from regate_ds.stores.values import Stores
from tests.support.batches import random_batch
from tests.support.planning import config_of
from tests.support.stores import RandomReference, index_of

KEYS = (("a", 3), ("b", 3), ("a", 4))


def inputs(keys=KEYS, counts=(4, 7, 5), step: int = 2) -> ScoreInputs:
    return ScoreInputs(step=step, keys=keys, num_labels_S=torch.tensor(counts), statistics={})


def test_random_values_belong_to_the_sample_wherever_it_stands():
    first, second, third = Random()(inputs()).split([4, 7, 5])
    turned = Random()(inputs(KEYS[::-1], (5, 7, 4))).split([5, 7, 4])
    assert torch.equal(torch.cat([first, second, third]), torch.cat(turned[::-1]))


@pytest.mark.parametrize(
    ("score", "step"), [(Random(seed=1), 2), (Random(), 3)], ids=["another seed", "another step"]
)
def test_random_values_are_drawn_anew_for(score: Random, step: int):
    assert not torch.equal(score(inputs(step=step)), Random()(inputs()))


def test_random_values_spread_evenly_over_positions():
    keys = tuple(("set", n) for n in range(400))
    values = Random()(inputs(keys, (10,) * 400)).view(400, 10)
    # Standard error of a mean of 400 values, uniform in [0, 1], is .0144.
    assert bool(((values.mean(0) - 0.5).abs() < 0.06).all())


@pytest.mark.parametrize("name", SCORES)
def test_a_score_says_what_it_needs_and_gets_along_with_it(name: str):
    score = SCORES[name]()
    given = ScoreInputs(
        step=0,
        keys=KEYS,
        num_labels_S=torch.tensor([4, 7, 5]),
        reference_N=torch.rand(16) if score.column else None,
        statistics={one.name: torch.rand(16) for one in score.statistics},
    )
    values_N = score(given)
    assert values_N.shape == (16,)
    assert bool((values_N > -math.inf).all())


def test_each_score_reads_the_column_that_it_names():
    columns = {name: score().column for name, score in SCORES.items()}
    assert {name for name, column in columns.items() if column == "text"} == {
        "fused",
        "reference",
        "excess_loss",
    }
    assert {name for name, column in columns.items() if column == "gain"} == {"gain"}
    assert ExcessLoss(reference="student").column == "student"


def test_a_window_without_labels_has_no_values():
    assert Random()(inputs((), ())).shape == (0,)


BATCH = random_batch([[12], [9]], seed=4)[1]
STEPS = 5


def plain_value(name: str, reference: float, seen: list[dict[str, float]]) -> float:
    """The score of one position whose forward passes gave these values, in order."""
    last = seen[-1] if seen else {"loss": math.inf, "entropy": math.inf}
    difficulty = 0.0
    for one in seen:
        difficulty = 0.3 * difficulty + 0.7 * one["loss"]
    return {
        "reference": reference,
        "gain": reference,
        "difficulty": difficulty,
        "loss": last["loss"],
        "entropy": last["entropy"],
        "excess_loss": last["loss"] - reference,
    }[name]


def opened(name: str) -> tuple[RegateConfig, Regate, list[float]]:
    """A session whose steps are sparse, and the teacher's losses."""
    knobs: dict[str, Any] = {"difficulty": {"decay": 0.3}, "keep_share": 0.4}
    # Of positions that are all at 0 the same would be kept for ever: a dense step shows them first.
    warmup = 1 if name == "difficulty" else 0
    config = config_of(score=name, warmup=warmup, final_dense_share=0.0, **knobs)
    index = index_of([BATCH])
    store = DifficultyStore(index, columns={one.name: one.unseen for one in config.statistics})
    reference = RandomReference(index)
    session = Regate(config, Stores(reference, store), total_steps=STEPS)
    return config, session, reference.read(BATCH.flat_keys).tolist()


@pytest.mark.parametrize(
    "name", ["reference", "difficulty", "loss", "excess_loss", "entropy", "gain"]
)
def test_a_session_keeps_in_each_step_what_a_plain_computation_ranks_first(name: str):
    _, session, reference = opened(name)
    labels = BATCH.is_label_BT.flatten().nonzero().flatten().tolist()
    seen: dict[int, list[dict[str, float]]] = {position: [] for position in labels}
    kept_sets = set()
    for step in range(STEPS):
        (plan,) = session.plan_step([BATCH]).micro
        value = {p: plain_value(name, r, seen[p]) for p, r in zip(labels, reference, strict=True)}
        wanted: list[int] = []
        for row in range(2):
            own = [p for p in labels if p // BATCH.labels_BT.shape[1] == row]
            best = sorted(own, key=lambda p: (-value[p], p))
            share = 1.0 if session.is_dense(step) else 0.4
            wanted += sorted(best[: math.ceil(share * len(own))])
        assert plan.label_position_L.tolist() == wanted
        if not session.is_dense(step):
            kept_sets.add(tuple(wanted))
        generator = torch.Generator().manual_seed(step)
        losses_L, entropies_L = 3 * torch.rand(2, len(wanted), generator=generator)
        session.record(plan, losses_L, entropy=entropies_L)
        session.finish_step(applied=True)
        for n, position in enumerate(wanted):
            seen[position].append({"loss": float(losses_L[n]), "entropy": float(entropies_L[n])})
    # What is remembered changes the choice; the store's values alone never do.
    assert (len(kept_sets) > 1) == (name not in ("reference", "gain"))


def test_a_host_that_records_no_entropy_is_refused_at_the_first_step():
    _, session, _ = opened("entropy")
    (plan,) = session.plan_step([BATCH]).micro
    session.record(plan, torch.ones(plan.num_targets))
    with pytest.raises(ValueError, match=r"made of 'entropy', but \['loss'\] were recorded"):
        session.finish_step(applied=True)
