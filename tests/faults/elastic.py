"""``python -m tests.faults.elastic [WORD]``: runs saved on some ranks go on with others.

Under DeepSpeed these are 1 to 4 ranks, and every other number; under Megatron-core, the cuts of
LAYOUTS, and every other cut. Each is compared with the run that the saving ranks would have ended:
the same kept counts, and losses and weights within rounding. Prints a row for each; exit code 1 if
one differs. WORD: only the kinds whose names hold it, such as "bf16".
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from regate_ds.adapters.megatron_on_cpu.shim import install
from tests.recipe.recipe_helper import Killed, KilledTrainer, rows, run, weights
from tests.support.ranks import run_ranks
from tests.support.small_corpus import TEXT, make_corpus

GLOBAL_BATCH = 12
"""What 1, 2, 3 and 4 ranks divide."""

PATIENCE = 1800
"""Seconds that a run may take."""

STAGES = (0, 1, 2, 3)

BF16_STAGES = (1, 2, 3)

LAYOUTS = {
    "tensor: 1": 1,
    "tensor: 2": 2,
    "tensor: 2, sequence: true": 1,
    "pipeline: 2": 1,
    "pipeline: 2, virtual: 2": 2,
    "tensor: 2, pipeline: 2": 1,
}
"""Data ranks of each cut."""

TOLERANCE = 1e-5
"""Largest relative difference of a loss or weight; sums over ranks differ in their last bits."""

BF16_TOLERANCE = 4e-2
"""The same in bf16, whose last bit is 2**-8 of a value."""


@dataclass(frozen=True)
class Ranks:
    """Some ranks that a run may have, and its settings there."""

    name: str
    number: int
    settings: tuple[str, ...]
    on_megatron: bool = False
    tolerance: float = TOLERANCE


def of_deepspeed(stage: int, precision: str = "fp32") -> list[Ranks]:
    zero = f"run.deepspeed={{zero_optimization: {{stage: {stage}}}}}"
    settings = (zero, f"run.precision={precision}")
    name = f"ZeRO {stage}{'' if precision == 'fp32' else f' in {precision}'}"
    tolerance = TOLERANCE if precision == "fp32" else BF16_TOLERANCE
    return [
        Ranks(f"{name}, {n} ranks", n, (*settings, batch(n)), tolerance=tolerance)
        for n in (1, 2, 3, 4)
    ]


def of_megatron(more: str) -> list[Ranks]:
    found = []
    for axes, data in LAYOUTS.items():
        number = data * (1 + ("tensor: 2" in axes)) * (1 + ("pipeline: 2" in axes))
        # Rows are filled up to what sequence parallelism needs, under every cut.
        cut = (f"parallel={{{axes}{more}}}", "elision.token_multiple=2")
        settings = ("run.deepspeed=null", *cut, batch(data))
        found.append(Ranks(f"{axes}{more}, {number} ranks", number, settings, on_megatron=True))
    return found


def batch(data_ranks: int) -> str:
    return f"run.accumulation={GLOBAL_BATCH // data_ranks}"


COMMON = (
    "run.micro_batch=1",
    "optimizer.lr=1e-2",
    "optimizer.weight_decay=0.1",
    "optimizer.warmup_steps=4",
)


def train_whole(rank: int, folder: str, out: str, ranks: Ranks, *more: str) -> None:
    if ranks.on_megatron:
        install()
    run(Path(folder), out, *COMMON, *ranks.settings, *more)


def train_half(rank: int, folder: str, out: str, ranks: Ranks) -> None:
    if ranks.on_megatron:
        install()
    try:
        run(Path(folder), out, *COMMON, *ranks.settings, trainer=KilledTrainer)
    except Killed:
        return
    raise AssertionError("the run was not killed")


def differences(folder: Path, one: str, other: str) -> tuple[float, float]:
    """Return the largest relative difference of a loss, and of a weight to its tensor's largest."""
    pairs = list(zip(rows(folder, one), rows(folder, other), strict=True))
    for mine, theirs in pairs:
        for count in ("answer_kept", "image_kept", "tokens_kept", "dense"):
            assert mine[count] == theirs[count], (count, mine, theirs)
    losses = [abs(mine["loss"] - theirs["loss"]) / theirs["loss"] for mine, theirs in pairs]
    whole, resumed = weights(folder, one), weights(folder, other)
    apart = [
        float((resumed[name] - weight).float().abs().max() / weight.abs().max().clamp(min=1e-3))
        for name, weight in whole.items()
        # The gradient of a key's bias is zero in theory: its steps are made of rounding.
        if not name.endswith("k_proj.bias")
    ]
    return max(losses), max(apart)


def main(word: str = "") -> int:
    with tempfile.TemporaryDirectory() as name:
        folder, failed = Path(name), 0
        make_corpus(folder, text={**TEXT, "num_hidden_layers": 4})
        teacher = [sys.executable, "-m", "regate_ds.cli", "teacher", str(folder / "run.yaml")]
        subprocess.run(teacher, check=True)
        kinds = [of_deepspeed(stage) for stage in STAGES]
        kinds += [of_deepspeed(stage, "bf16") for stage in BF16_STAGES]
        kinds += [of_megatron(more) for more in ("", ", distributed_optimizer: true")]
        for number, kind in enumerate(kinds):
            for saving, going_on in itertools.permutations(kind, 2):
                if word in saving.name:
                    failed += resumed_apart(folder, number, saving, going_on) > saving.tolerance
        return min(failed, 1)


def resumed_apart(folder: Path, kind: int, saving: Ranks, going_on: Ranks) -> float:
    """Return how far the resumed run is from the whole one of the saving ranks; print it."""
    stem = f"{kind}-{saving.name}".replace(" ", "").replace(":", "").replace(",", "-")
    whole, half = f"{stem}-whole", f"{stem}-half"
    if not (folder / half).exists():
        run_ranks(train_whole, saving.number, str(folder), whole, saving, timeout=PATIENCE)
        run_ranks(train_half, saving.number, str(folder), half, saving, timeout=PATIENCE)
    out = f"{stem}-resumed"
    shutil.copytree(folder / half, folder / out)
    more = ("run.resume=true",)
    run_ranks(train_whole, going_on.number, str(folder), out, going_on, *more, timeout=PATIENCE)
    losses, apart = differences(folder, whole, out)
    print(
        f"saved by {saving.name}, resumed on {going_on.name}: losses {losses:.1e}, weights "
        f"{apart:.1e}",
        flush=True,
    )
    shutil.rmtree(folder / out)
    return max(losses, apart)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
