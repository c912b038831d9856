"""What a step keeps depends on its global batch, not on how it is spread over data ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.parallel.layout import ParallelLayout
from regate_ds.session import Regate
from regate_ds.stores.difficulty.indexed import DifficultyStore
from regate_ds.stores.values import Stores
from tests.support.models import random_batch
from tests.support.planning import config_of
from tests.support.ranks import run_ranks
from tests.support.stores import RandomReference, index_of

NUM_SAMPLES, NUM_STEPS = 8, 4
QUOTAS = ["per_sample", "per_window", "threshold"]


def sample(step: int, number: int) -> TokenBatch:
    """One row; labels of 3 to 30 tokens."""
    _, batch = random_batch([[6 + 3 * number + step]], seed=100 * step + number)
    key = ((("set", NUM_SAMPLES * step + number),),)
    return TokenBatch(key, batch.segment_BT, batch.labels_BT)


def window_of(step: int, rank: int, size: int) -> list[TokenBatch]:
    share = NUM_SAMPLES // size
    return [sample(step, number) for number in range(rank * share, (rank + 1) * share)]


def check_kept(rank: int, out: str) -> None:
    """Write what each quota keeps of each sample in sparse steps, with losses made up by it."""
    size = dist.get_world_size()
    group = dist.group.WORLD if size > 1 else None
    index = index_of([sample(s, n) for s in range(NUM_STEPS) for n in range(NUM_SAMPLES)])
    found = {}
    for quota in QUOTAS:
        store = DifficultyStore(index, group)
        config = config_of(
            warmup=0, final_dense_share=0.0, quota=quota, per_window={"floor": 0.1}, keep_share=0.4
        )
        stores = Stores(RandomReference(index), store)
        layout = ParallelLayout(data=group)
        session = Regate(config, stores, total_steps=NUM_STEPS, layout=layout)
        for step in range(NUM_STEPS):
            window = window_of(step, rank, size)
            plan = session.plan_step(window)
            for batch, micro in zip(window, plan.micro, strict=True):
                session.record(micro, micro.label_position_L.float() + 0.5)
                found[f"{quota} {batch.flat_keys[0][1]}"] = micro.position_R.tolist()
            kept = {name: plan.counts[name] for name in ("tokens_kept", "answer_kept")}
            found[f"{quota} counts {step}"] = kept
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
    assert kept[1].keys() >= {f"{quota} {NUM_SAMPLES - 1}" for quota in QUOTAS}
    assert kept[1] == kept[2] == kept[4]


@pytest.mark.parametrize("quota", QUOTAS)
def test_a_run_that_is_resumed_keeps_what_it_would_have_kept(quota: str):
    index = index_of([sample(s, n) for s in range(NUM_STEPS) for n in range(NUM_SAMPLES)])
    knobs = {"warmup": 0, "final_dense_share": 0.0, "quota": quota, "keep_share": 0.4}

    def opened() -> Regate:
        stores = Stores(RandomReference(index), DifficultyStore(index))
        return Regate(config_of(**knobs), stores, total_steps=NUM_STEPS)

    def step(session: Regate, number: int) -> list[torch.Tensor]:
        plan = session.plan_step(window_of(number, 0, 1))
        for micro in plan.micro:
            session.record(micro, torch.ones(micro.num_targets))
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
