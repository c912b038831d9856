"""What a step keeps depends on its global batch, not on how it is spread over data ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.scores.table import SCORES
from regate_ds.config import RegateConfig
from regate_ds.parallel.layout import ParallelLayout
from regate_ds.session import Regate
from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.stores.difficulty.indexed import DifficultyStore
from regate_ds.stores.values import Stores
from tests.support.models import random_batch
from tests.support.planning import config_of
from tests.support.ranks import run_ranks
from tests.support.stores import RandomReference, index_of

NUM_SAMPLES, NUM_STEPS = 8, 4
SHARE = {"points": [[0.0, 0.6], [1.0, 0.2]]}
QUOTAS = ["per_sample", "per_window", "threshold"]
METHODS = [("fused", quota) for quota in QUOTAS]
OTHERS = [(score, "per_window") for score in SCORES if score != "fused"]
"""Scores meet a quota that compares samples; the paper's meets every quota."""

ON_RANKS = [*METHODS, ("excess_loss", "per_window")]


def sample(step: int, number: int) -> TokenBatch:
    """One row; labels of 3 to 30 tokens."""
    _, batch = random_batch([[6 + 3 * number + step]], seed=100 * step + number)
    key = ((("set", NUM_SAMPLES * step + number),),)
    return TokenBatch(key, batch.segment_BT, batch.labels_BT)


def window_of(step: int, rank: int, size: int) -> list[TokenBatch]:
    share = NUM_SAMPLES // size
    return [sample(step, number) for number in range(rank * share, (rank + 1) * share)]


def store_of(config: RegateConfig, index: AnswerIndex, group: Any = None) -> DifficultyStore:
    columns = {one.name: one.unseen for one in config.statistics}
    return DifficultyStore(index, group, columns=columns)


def check_kept(rank: int, out: str) -> None:
    """Write what each method keeps of each sample in sparse steps, with losses made up by it."""
    size = dist.get_world_size()
    group = dist.group.WORLD if size > 1 else None
    index = index_of([sample(s, n) for s in range(NUM_STEPS) for n in range(NUM_SAMPLES)])
    found = {}
    for score, quota in ON_RANKS:
        knobs = {"score": score, "quota": quota, "per_window": {"floor": 0.1}, "keep_share": SHARE}
        config = config_of(warmup=0, final_dense_share=0.0, **knobs)
        stores = Stores(RandomReference(index), store_of(config, index, group))
        layout = ParallelLayout(data=group)
        session = Regate(config, stores, total_steps=NUM_STEPS, layout=layout)
        for step in range(NUM_STEPS):
            window = window_of(step, rank, size)
            plan = session.plan_step(window)
            for batch, micro in zip(window, plan.micro, strict=True):
                losses_L = micro.label_position_L.float() + 0.5
                session.record(micro, losses_L, entropy=losses_L.log1p())
                found[f"{score} {quota} {batch.flat_keys[0][1]}"] = micro.position_R.tolist()
            kept = {name: plan.counts[name] for name in ("tokens_kept", "answer_kept")}
            found[f"{score} {quota} counts {step}"] = kept
            session.finish_step(applied=True)
    Path(out, f"{size}-{rank}.json").write_text(json.dumps(found))


def test_the_kept_set_is_the_same_on_1_2_and_4_data_ranks(tmp_path: Path):
    for size in (1, 2, 4):
        run_ranks(check_kept, size, str(tmp_path))
    kept = {
        size: {
            name: value
            for rank in range(size)
            for name, value in json.loads((tmp_path / f"{size}-{rank}.json").read_text()).items()
        }
        for size in (1, 2, 4)
    }
    assert kept[1].keys() >= {f"{score} {quota} {NUM_SAMPLES - 1}" for score, quota in ON_RANKS}
    assert kept[1] == kept[2] == kept[4]


@pytest.mark.parametrize(("score", "quota"), METHODS + OTHERS)
def test_a_run_that_is_resumed_keeps_what_it_would_have_kept(score: str, quota: str):
    index = index_of([sample(s, n) for s in range(NUM_STEPS) for n in range(NUM_SAMPLES)])
    knobs = {"score": score, "quota": quota, "keep_share": SHARE}
    config = config_of(warmup=0, final_dense_share=0.0, **knobs)

    def opened() -> Regate:
        stores = Stores(RandomReference(index), store_of(config, index))
        return Regate(config, stores, total_steps=NUM_STEPS)

    def step(session: Regate, number: int) -> list[torch.Tensor]:
        plan = session.plan_step(window_of(number, 0, 1))
        for micro in plan.micro:
            ones_L = torch.ones(micro.num_targets)
            session.record(micro, ones_L, entropy=ones_L)
        session.finish_step(applied=True)
        return [micro.position_R for micro in plan.micro]

    straight, begun = opened(), opened()
    wanted = [step(straight, number) for number in range(NUM_STEPS)]
    for number in range(2):
        step(begun, number)
    resumed = opened()
    resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
    # Every sample is seen once: no difficulty crosses the break.
    for number in range(2, NUM_STEPS):
        found = step(resumed, number)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted[number], strict=True))
