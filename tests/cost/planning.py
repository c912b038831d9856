"""CPU time of planning a step and of its stores, by the size of the step.

    python -m tests.cost.planning

On one data rank, so that nothing is exchanged. Before each step 64 MB are written, as the passes of
a step would: what planning reads is not in the caches any more.
"""

from __future__ import annotations

import statistics
import time

import torch

from regate_ds.recipe.bench.arms import ARMS, StepArm
from regate_ds.recipe.bench.case import StepCase, as_loaded, make_data
from regate_ds.recipe.bench.host import ENDLESS
from regate_ds.session import Regate
from regate_ds.stores.difficulty.indexed import DifficultyStore
from regate_ds.stores.values import Stores

STEPS = {
    "2k: 4 samples": StepCase(samples=4, tokens=512),
    "2k: 16 samples": StepCase(samples=16, tokens=128),
    "8k: 16 samples": StepCase(samples=16, tokens=512),
    "8k: 4 x 4": StepCase(samples=4, tokens=512, micro_batches=4),
    "8k: 16 x 1": StepCase(samples=1, tokens=512, micro_batches=16),
    "32k: 64 samples": StepCase(samples=64, tokens=512),
    "32k: 8 x 4": StepCase(samples=4, tokens=1024, micro_batches=8),
    "32k: 8 x 1": StepCase(samples=1, tokens=4096, micro_batches=8),
}
"""Tokens: samples, or micro-batches x samples."""

ARM_NAMES = ("ours_dense", "elide_1", "images_1")
TURNS = 15


def milliseconds(case: StepCase, arm: StepArm) -> float:
    """Return the median over turns of one step's plan, record and end."""
    config, data, caches = arm.config(case), make_data(case), torch.zeros(16 << 20)
    losses_N = torch.rand(case.samples * case.tokens)
    session = Regate(config, Stores(data, DifficultyStore(data.index)), total_steps=ENDLESS)
    found = []
    for _ in range(TURNS + 1):
        window = [batch.tokens for batch in as_loaded(data.batches)]
        caches.add_(1)
        begin = time.process_time()
        plan = session.plan_step(window)
        for micro in plan.micro:
            session.record(micro, losses_N[: micro.num_targets])
        session.finish_step(applied=True)
        found.append(1000 * (time.process_time() - begin))
    return statistics.median(found[1:])


def main() -> None:
    torch.set_num_threads(1)
    print(f"| step | {' | '.join(ARM_NAMES)} |\n| --- |{' --- |' * len(ARM_NAMES)}")
    for name, case in STEPS.items():
        cells = [f"{milliseconds(case, ARMS[arm]):.1f}" for arm in ARM_NAMES]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
