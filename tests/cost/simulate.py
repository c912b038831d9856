"""How long 64 ranks wait for the busiest: a plain sampler against one that divides by cost.

    python -m tests.cost.simulate

Costs are drawn from a gamma distribution with a coefficient of variation of .5.
"""

from __future__ import annotations

import statistics

from regate_ds.cost.balance import divide, imbalance
from regate_ds.cost.pipeline import makespan, smooth_order
from tests.cost.test_balance import RANKS, drawn, in_order

SEEDS = range(10)


def main() -> None:
    print(
        "| samples a rank | in order | by cost | by cost, equally many |\n| --- | --- | --- | --- |"
    )
    for per_rank in (1, 2, 4, 8, 16, 32):
        found = []
        for seed in SEEDS:
            costs = drawn(RANKS * per_rank, 0.5, seed)
            divisions = [in_order(len(costs), RANKS), divide(costs, RANKS, 1)]
            divisions.append(divide(costs, RANKS, 1, equal=True))
            found.append([imbalance(costs, one) for one in divisions])
        cells = " | ".join(f"{statistics.mean(column):.3f}" for column in zip(*found))
        print(f"| {per_rank} | {cells} |")
    print("\n| stages, micro-batches | drawn order | rising and falling |\n| --- | --- | --- |")
    for stages, num in ((2, 8), (4, 16), (8, 32)):
        found = []
        for seed in SEEDS:
            costs = drawn(num, 0.5, seed)
            ideal = 3 * sum(costs)
            ordered = [costs[n] for n in smooth_order(costs)]
            found.append([makespan(one, stages) / ideal for one in (costs, ordered)])
        cells = " | ".join(f"{statistics.mean(column):.3f}" for column in zip(*found))
        print(f"| {stages}, {num} | {cells} |")


if __name__ == "__main__":
    main()
