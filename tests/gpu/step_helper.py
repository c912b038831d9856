"""`regate bench step` on the device: time over the FLOPs' ratio, memory, waits for the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial

import torch

from regate_ds.recipe.bench.arms import ARMS, arms_of
from regate_ds.recipe.bench.case import StepCase
from regate_ds.recipe.bench.huggingface import HuggingFaceHost
from regate_ds.recipe.bench.step import run_case
from tests.gpu.check_helper import Check, Measured

ROWS = ("ours_dense", "elide_0", "elide_1", "images_1")
OURS = ("elide_0", "elide_1", "images_1")


def cases(device: torch.device) -> dict[str, StepCase]:
    """Layers like those of models with 1.5 and 7 billion weights; small ones without a GPU."""
    if device.type == "cpu":
        return {
            "small": StepCase(hidden=64, layers=2, tokens=32, samples=2, vocabulary=128, rounds=1)
        }
    found = {}
    for hidden, tokens in ((2048, 2048), (2048, 8192), (4096, 2048), (4096, 8192)):
        found[f"hidden {hidden}, {tokens} tokens"] = StepCase(
            hidden=hidden,
            layers=4,
            tokens=tokens,
            samples=8192 // tokens,
            vocabulary=152_064,
            precision="bf16",
            rounds=5,
            arms=ROWS,
        )
    return found


def step(device: torch.device) -> Iterator[Check]:
    for name, case in cases(device).items():
        yield Check("time over the ratio of FLOPs", case.precision, partial(ratios, case), name)
        yield Check("waits for the device", case.precision, partial(waits, case, device), name)


def ratios(case: StepCase) -> Measured:
    """The worst row's time over ideal; on a CPU it is no matter of a check."""
    rows = run_case(case)["rows"]
    worst = max(rows[name]["over_ideal"] for name in OURS)
    shown = [
        f"{name} {rows[name]['of_dense']:.3f} of dense, {rows[name]['over_ideal']:.3f} over ideal, "
        f"peak {rows[name]['peak_bytes'] / rows['dense']['peak_bytes']:.3f}"
        for name in OURS
    ]
    bound = 1.10 if torch.cuda.is_available() else float("inf")
    return Measured(worst, bound, "; ".join(shown))


def waits(case: StepCase, device: torch.device) -> Measured:
    """Waits of our rows in their passes, as CUDA reports them, beyond those of the host's row."""
    host = HuggingFaceHost(case, {name: ARMS[name] for name in ("host", *OURS)}, device)
    counts = {name: _waits(host, name, device) for name in arms_of(case) if name in ("host", *OURS)}
    extra = max(counts[name] for name in OURS) - counts["host"]
    return Measured(max(0, extra), 0.0, str(counts))


def _waits(host: HuggingFaceHost, name: str, device: torch.device) -> int:
    with host.ready(name) as parts:
        plan = parts.plan()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                found = parts.passes(plan, lambda micro: micro)
            finally:
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        parts.end(plan, found)
    return sum("synchroniz" in str(one.message) for one in caught)
