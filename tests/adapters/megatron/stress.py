"""Random layouts, shapes, counts and schedules, each equal to the plain model.

python -m tests.adapters.megatron.stress [--cases N] [--seed S]
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from tests.adapters.megatron.cases_helper import Case
from tests.adapters.megatron.checks_helper import check
from tests.adapters.megatron.pool_helper import Pool

MAX_RANKS = 4


def random_case(rng: random.Random) -> Case:
    model = rng.choice(["gpt", "gpt", "gpt", "tied", "moe", "llava"])
    sizes = _sizes(rng, model)
    vpp = rng.choice([1, 2]) if sizes["pp"] == 2 and model != "llava" else 1
    stages = sizes["pp"] * vpp
    num_layers = stages * rng.choice([1, 2] if stages > 1 else [2, 3, 4])
    sp = sizes["tp"] > 1 and rng.random() < 0.7
    row_format = rng.choice(["padded", "ragged"])
    execution = rng.choice(["elide", "elide", "loss_only"])
    first = rng.randrange(0, num_layers // stages + 1 if vpp > 1 else num_layers)
    first = min(first, num_layers - 1)
    last = None if vpp > 1 or rng.random() < 0.5 else rng.randrange(first + 1, num_layers + 1)
    return Case(
        **sizes,
        vpp=vpp,
        sp=sp,
        model=model,
        row_format=row_format,
        first_layer=first,
        last_layer=last,
        recompute=rng.choice(["none", "full", "selective"]),
        num_layers=num_layers,
        num_micro=2 * rng.randrange(1, 4) if vpp > 1 else rng.randrange(1, 6),
        rows=rng.randrange(1, 4),
        length=8 * rng.randrange(2, 6),
        packed=row_format == "ragged" and _packs(sizes, model) and rng.random() < 0.5,
        keep_share=rng.choice([0.1, 0.3, 0.5, 0.9]),
        dense=rng.random() < 0.1,
        token_multiple=rng.choice([1, 1, 3, 4]),
        one_slice=model != "llava" and row_format == "padded" and rng.random() < 0.2,
        seed=rng.randrange(1000),
        execution=execution,
        image_share=rng.choice([0.1, 0.3, 0.5, 1.0]) if execution == "elide" else 1.0,
        score=rng.choice(["fused", "fused", "random"]),
        quota=rng.choice(["per_sample", "per_window", "threshold"]),
    )


def _sizes(rng: random.Random, model: str) -> dict[str, int]:
    """Parallel sizes of at most MAX_RANKS ranks."""
    axes = {"moe": ["pp", "dp"], "llava": ["pp", "dp"]}.get(model, ["tp", "pp", "cp", "dp"])
    sizes = dict.fromkeys(("tp", "pp", "cp", "dp", "ep"), 1)
    for _ in range(rng.choice([0, 1, 1, 2])):
        sizes[rng.choice(axes)] *= 2
    # Four heads in two groups, and two halves of a zigzag: more ranks than two need more rows.
    sizes["tp"], sizes["cp"] = min(sizes["tp"], 2), min(sizes["cp"], 2)
    if model == "moe" and sizes["dp"] > 1:
        sizes["ep"] = 2
    return sizes


def _packs(sizes: dict[str, int], model: str) -> bool:
    return model != "llava" and sizes["cp"] == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    options = parser.parse_args()
    print(f"{options.cases} cases from seed {options.seed}", flush=True)
    rng, pool, failed = random.Random(options.seed), Pool(), 0
    for number in range(options.cases):
        case = random_case(rng)
        try:
            pool.run(case.world, check, case)
        except AssertionError as problem:
            failed += 1
            print(f"\n{number}: {problem}", flush=True)
        if sys.stderr.isatty() or number % 20 == 19:
            print(f"\r{number + 1} done, {failed} failed", end="", flush=True)
    pool.close()
    print(f"\n{options.cases - failed} passed, {failed} failed (seed {options.seed})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
