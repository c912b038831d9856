"""Each example of launch/ that uses DeepSpeed, two steps under every ZeRO stage it has.

A program, run by `make test-examples`: fourteen jobs of two gloo ranks.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from functools import partialmethod
from importlib import import_module
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist

from tests.adapters.trainers.trl_page_helper import save_processor
from tests.adapters.trainers.trl_zero_helper import check_trl
from tests.support.paths import ROOT
from tests.support.ranks import run_ranks
from tests.support.small_corpus import make_corpus

STEPS, NUM_TRAIN = 2, 16

EXAMPLES = {
    "deepspeed_loop": (0, 1, 2, 3),
    "hf_trainer": (0, 1, 2, 3),
    "trl_sft_vlm": (0, 1, 2, 3),
    # DeepSpeed's pipeline has no others.
    "deepspeed_pipeline": (0, 1),
}
"""By the name of its file: its stages."""


def main() -> None:
    wanted = sys.argv[1:] or list(EXAMPLES)
    if not sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            run_ranks(check_trl, 2, Path(folder))
        print(
            "TRL under ZeRO-2 and ZeRO-3: the oracle's gradients, and off its own run", flush=True
        )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_corpus(root, num_train=NUM_TRAIN, num_test=1)
        save_processor(root / "student")
        for name, stage in [(each, stage) for each in wanted for stage in EXAMPLES[each]]:
            run_ranks(check_example, 2, name, stage, str(root))
            print(f"{name}.py, ZeRO-{stage}: {STEPS} steps", flush=True)


def check_example(rank: int, name: str, stage: int, folder: str) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Its loader starts two workers a rank and epoch.
    io = deepspeed.DeepSpeedEngine.deepspeed_io
    deepspeed.DeepSpeedEngine.deepspeed_io = partialmethod(io, num_local_io_workers=0)
    sys.path.insert(0, str(ROOT / "launch" / "examples"))
    root = Path(folder)
    given = [root / "student", root / "data" / "train.json", root / f"{name}-{stage}"]
    example = import_module(name)
    if hasattr(example, "DS"):
        example.DS["zero_optimization"] = {"stage": stage}
    else:
        given += ["--deepspeed", configuration(root, rank, stage)]
    example.STEPS, example.EPOCHS = STEPS, 1
    losses = losses_of(example.main([str(each) for each in given]))
    assert len(losses) == STEPS, losses
    check_all_stages_agree(root / f"{name}-losses-{rank}.json", losses)
    dist.barrier()


def configuration(root: Path, rank: int, stage: int) -> Path:
    """Write what an example is given by a file."""
    path = root / f"zero-{stage}-{rank}.json"
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    fields = {**dict.fromkeys(auto, "auto"), "zero_optimization": {"stage": stage}}
    path.write_text(json.dumps(fields))
    return path


def losses_of(found: Any) -> list[float]:
    """Of a Trainer, or as the loops return them."""
    if isinstance(found, list):
        return found[:STEPS]
    return [row["loss"] for row in found.state.log_history if "loss" in row]


def check_all_stages_agree(path: Path, losses: list[float]) -> None:
    """The first stage writes its losses; the others have the same, but for other sums."""
    if not path.is_file():
        path.write_text(json.dumps(losses))
    for mine, theirs in zip(losses, json.loads(path.read_text()), strict=True):
        assert mine > 0
        assert math.isclose(mine, theirs, rel_tol=1e-4), (mine, theirs)


if __name__ == "__main__":
    main()
