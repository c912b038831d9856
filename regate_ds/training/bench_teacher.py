"""`regate bench --teacher`: the teacher's scoring against the plain forward pass with full logits.

Time in process CPU seconds, interleaved; memory as what each pass adds to the resident set at its
peak, on Linux. Ratios of one run on one machine.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from regate_ds.algorithm.batch import IGNORE
from regate_ds.data.encode import EncodedSample
from regate_ds.teacher.text_only import score_samples

_MMAP_THRESHOLD = -3
"""glibc's name of the size from which on memory is given back as soon as it is freed."""


@dataclass(frozen=True, kw_only=True)
class TeacherCase:
    """A Llama, and one batch of which every position is a label, as is worst for us."""

    hidden: int = 512
    num_layers: int = 4
    vocabulary: int = 32_000
    num_samples: int = 1
    num_tokens: int = 2048
    num_pairs: int = 10
    num_threads: int = 1


def run_teacher_bench(case: TeacherCase) -> dict[str, Any]:
    """Seconds and bytes of both passes, their ratios, and how far their losses are apart."""
    torch.set_num_threads(case.num_threads)
    torch.manual_seed(0)
    model = LlamaForCausalLM(_config(case)).eval()
    ids_BT = torch.randint(case.vocabulary, (case.num_samples, case.num_tokens))
    samples = [_sample(number, ids_S) for number, ids_S in enumerate(ids_BT)]
    passes: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: _plain(model, ids_BT),
        "ours": lambda: score_samples(model, samples, pad_id=0),
    }
    losses = {name: one() for name, one in passes.items()}
    seconds = _seconds(passes, case.num_pairs)
    growth = _growth(passes)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["plain"], strict=True)]
    return {
        "case": asdict(case),
        "cpu_seconds": {name: statistics.median(taken) for name, taken in seconds.items()},
        "time_ratio": statistics.median(ratios),
        "peak_bytes": growth,
        "memory_ratio": growth["ours"] / growth["plain"],
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
    """All logits at once, as Hugging Face models give them."""
    logits_NV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits_NV, ids_BT[:, 1:].flatten(), reduction="none")


def _seconds(passes: dict[str, Callable[[], Tensor]], num_pairs: int) -> dict[str, list[float]]:
    """CPU seconds of every pass, one after the other in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(num_pairs):
        for name, one in passes.items():
            begin = time.process_time()
            one()
            seconds[name].append(time.process_time() - begin)
    return seconds


def _growth(passes: dict[str, Callable[[], Tensor]]) -> dict[str, int]:
    """The most bytes that any of three passes added to the memory."""
    # Otherwise glibc keeps what one pass has freed, and the next one seems to need nothing.
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 16)
    growth = dict.fromkeys(passes, 0)
    for _ in range(3):
        for name, one in passes.items():
            before = _peak_after_reset()
            one()
            growth[name] = max(growth[name], _peak() - before)
    return growth


def _peak_after_reset() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """Largest resident memory since the reset, in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _sample(number: int, ids_S: Tensor) -> EncodedSample:
    labels_S = ids_S.roll(-1)
    labels_S[-1] = IGNORE
    no_image_S = torch.zeros_like(ids_S, dtype=torch.bool)
    return EncodedSample(("bench", number), ids_S, labels_S, no_image_S, char_spans=(), images=())


def _config(case: TeacherCase) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.hidden * 8 // 3,
        num_hidden_layers=case.num_layers,
        num_attention_heads=case.hidden // 64,
        num_key_value_heads=case.hidden // 64,
        max_position_embeddings=case.num_tokens,
    )
