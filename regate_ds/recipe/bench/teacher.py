"""`regate bench teacher`: compare the teacher's scoring with a forward pass with full logits.

Time is process CPU seconds of passes that take turns. Memory is the bytes of live tensors at the
peak of a pass, without the weights. The ratios hold for one run on one node.
"""

from __future__ import annotations

import json
import statistics
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from regate_ds.recipe.bench.harness import Sizes, interleaved, text_sample
from regate_ds.recipe.bench.measures import LiveBytes
from regate_ds.teacher.scoring import score_samples


@dataclass(frozen=True, kw_only=True)
class TeacherCase(Sizes):
    """Sizes of one batch whose every position is a label, the worst case for our scoring."""

    vocabulary: int = 32_000
    num_samples: int = 1
    num_tokens: int = 2048
    num_pairs: int = 10


def main(argv: Sequence[str]) -> None:
    """Run the benchmark, print a table, and write JSON if asked."""
    parser = ArgumentParser(prog="regate bench teacher", description=__doc__)
    parser.add_argument("--pairs", type=int, default=TeacherCase.num_pairs, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    args = parser.parse_args(argv)
    if args.pairs < 1:
        parser.error(f"--pairs {args.pairs}: must be at least 1")
    result = run_teacher_bench(TeacherCase(num_pairs=args.pairs))
    print(teacher_table(result))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def run_teacher_bench(case: TeacherCase) -> dict[str, Any]:
    """Return seconds and bytes of both passes, their ratios, and their losses' difference."""
    torch.set_num_threads(case.num_threads)
    torch.manual_seed(0)
    model, ids_BT = LlamaForCausalLM(case.llama()).eval(), case.ids()
    samples = [text_sample(number, ids_S) for number, ids_S in enumerate(ids_BT)]
    passes: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: _plain(model, ids_BT),
        "ours": lambda: score_samples(model, samples, pad_id=0),
    }
    losses, peaks = {}, {}
    for name, run_pass in passes.items():
        with LiveBytes() as live:
            losses[name] = run_pass()
        peaks[name] = live.peak
    seconds = interleaved(passes, case.num_pairs)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["plain"], strict=True)]
    return {
        "case": asdict(case),
        "cpu_seconds": {name: statistics.median(taken) for name, taken in seconds.items()},
        "time_ratio": statistics.median(ratios),
        "peak_bytes": peaks,
        "memory_ratio": peaks["ours"] / peaks["plain"],
        "largest_difference": float((losses["ours"] - losses["plain"]).abs().max()),
    }


def teacher_table(result: dict[str, Any]) -> str:
    lines = [f"{'teacher pass':<24}{'CPU s':>10}{'peak MB':>10}"]
    for name, seconds in result["cpu_seconds"].items():
        lines.append(f"{name:<24}{seconds:>10.3f}{result['peak_bytes'][name] / 1e6:>10.1f}")
    ratios = f"{result['time_ratio']:>10.3f}{result['memory_ratio']:>10.3f}"
    return "\n".join([*lines, f"{'ours / plain':<24}{ratios}"])


@torch.inference_mode()
def _plain(model: LlamaForCausalLM, ids_BT: Tensor) -> Tensor:
    """Compute the losses from all logits at once, as Hugging Face models give them."""
    logits_NV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits_NV, ids_BT[:, 1:].flatten(), reduction="none")
