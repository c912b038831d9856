"""``python -m tests.faults.elastic``: runs saved on 1 to 4 ranks go on with every other number.

Each is compared with the run that the saving ranks would have ended: the same kept counts, and
losses and weights within rounding. Prints a row for each; exit code 1 if one differs.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.recipe.recipe_helper import Killed, KilledTrainer, rows, run, weights
from tests.support.ranks import run_ranks
from tests.support.small_corpus import make_corpus

GLOBAL_BATCH = 12
"""What 1, 2, 3 and 4 ranks divide."""

STAGES = (0, 1, 2, 3)

TOLERANCE = 1e-5
"""Largest relative difference of a loss; sums over ranks differ in their last bits."""


def settings(stage: int, world_size: int) -> list[str]:
    return [
        f"run.deepspeed={{zero_optimization: {{stage: {stage}}}}}",
        "run.micro_batch=1",
        f"run.accumulation={GLOBAL_BATCH // world_size}",
        "optimizer.lr=1e-2",
        "optimizer.weight_decay=0.1",
        "optimizer.warmup_steps=4",
    ]


def train_whole(rank: int, folder: str, out: str, stage: int, world_size: int) -> None:
    run(Path(folder), out, *settings(stage, world_size))


def train_half(rank: int, folder: str, out: str, stage: int, world_size: int) -> None:
    try:
        run(Path(folder), out, *settings(stage, world_size), trainer=KilledTrainer)
    except Killed:
        return
    raise AssertionError("the run was not killed")


def go_on(rank: int, folder: str, out: str, stage: int, world_size: int) -> None:
    run(Path(folder), out, *settings(stage, world_size), "run.resume=true")


def difference(folder: Path, one: str, other: str) -> float:
    """Return the largest relative difference of a loss, or of a weight to its tensor's largest."""
    pairs = list(zip(rows(folder, one), rows(folder, other), strict=True))
    for mine, theirs in pairs:
        for count in ("answer_kept", "image_kept", "tokens_kept", "dense"):
            assert mine[count] == theirs[count], (count, mine, theirs)
    losses = [abs(mine["loss"] - theirs["loss"]) / theirs["loss"] for mine, theirs in pairs]
    whole, resumed = weights(folder, one), weights(folder, other)
    apart = [
        float((resumed[name] - weight).abs().max() / weight.abs().max().clamp(min=1e-3))
        for name, weight in whole.items()
    ]
    return max(*losses, *apart)


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder, failed = Path(name), 0
        make_corpus(folder)
        teacher = [sys.executable, "-m", "regate_ds.cli", "teacher", str(folder / "run.yaml")]
        subprocess.run(teacher, check=True)
        for stage, saving in itertools.product(STAGES, (1, 2, 3, 4)):
            whole, half = f"whole-{stage}-{saving}", f"half-{stage}-{saving}"
            run_ranks(train_whole, saving, name, whole, stage, saving)
            run_ranks(train_half, saving, name, half, stage, saving)
            for going_on in (n for n in (1, 2, 3, 4) if n != saving):
                out = f"{half}-{going_on}"
                shutil.copytree(folder / half, folder / out)
                run_ranks(go_on, going_on, name, out, stage, going_on)
                found = difference(folder, whole, out)
                failed += found > TOLERANCE
                print(f"ZeRO {stage}: saved by {saving}, resumed on {going_on}: {found:.1e}")
        return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
