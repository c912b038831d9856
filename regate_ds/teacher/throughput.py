"""Measure how fast a teacher's job was: in tokens a second, and against the plain forward pass.

Shapes: B samples, T positions of the longest, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.teacher.scoring import ScoredSample, teacher_inputs

PLAIN_TOKENS = 2048
"""Largest number of tokens in a batch for the plain forward pass: its logits [B, T, V] must not
break a job that itself did without them."""

NUM_MEASURED = 3
"""Number of batches that are measured; each runs twice each way, the first time to warm up."""


@dataclass(frozen=True)
class Throughput:
    """The work of all ranks in this start of the job; all zero if an earlier start had done it."""

    num_tokens: int
    """Number of tokens of the scored samples, prompt and placeholders included."""

    seconds: float
    """Time that the scoring took."""

    busy_share: float = 0.0
    """Share of the seconds in which this rank's teacher worked; the rest went into reading samples,
    writing shards and waiting for other ranks."""

    score_share: float | None = None
    """Seconds of the plain forward pass over seconds of scoring, on the same batches; None if it
    was not measured."""

    @property
    def share_of_plain(self) -> float | None:
        """Speed of the job over that of plain forward passes, with all logits, without a pause."""
        return None if self.score_share is None else self.busy_share * self.score_share

    def __str__(self) -> str:
        if self.num_tokens == 0:
            return "nothing was left to compute"
        rate = f"{self.num_tokens / max(self.seconds, 1e-9):.0f} tokens/s"
        share = self.share_of_plain
        plain = "" if share is None else f", {share:.2f} of plain forward speed"
        return f"{self.num_tokens} tokens in {self.seconds:.1f} s ({rate}{plain})"


def measure_share(
    batches: Sequence[Sequence[ScoredSample]],
    score: Callable[[Sequence[ScoredSample]], Any],
    plain: Callable[[Sequence[ScoredSample]], Any],
) -> float | None:
    """Return the seconds of ``plain`` over those of ``score`` on the batches; None without any."""
    seconds = {score: 0.0, plain: 0.0}
    for batch in batches:
        for run in (score, plain):
            run(batch)
        for run in (score, plain):
            begin = time.perf_counter()
            # Both return values in CPU memory, and so wait until the device has finished.
            run(batch)
            seconds[run] += time.perf_counter() - begin
    return seconds[plain] / seconds[score] if batches else None


def measurable(rows: Sequence[int], lengths_S: Tensor) -> list[int]:
    """Return as many rows of a batch, shortest first, as the plain forward pass may hold."""
    chosen: list[int] = []
    for row in sorted(rows, key=lambda row: int(lengths_S[row])):
        if (len(chosen) + 1) * int(lengths_S[row]) > PLAIN_TOKENS:
            break
        chosen.append(row)
    return chosen


@torch.inference_mode()
def plain_forward(teacher: nn.Module, samples: Sequence[ScoredSample], *, pad_id: int) -> Tensor:
    """Run the model's own forward pass over the samples, with the logits of all positions.

    Returns one logit of each sample, on the CPU.
    """
    ids = [sample.input_ids_S for sample in samples]
    inputs = teacher_inputs(ids, [sample.is_placeholder_S for sample in samples], pad_id)
    device = next(teacher.parameters()).device
    logits_BTV = teacher(
        input_ids=inputs.input_ids_BT.to(device),
        attention_mask=inputs.attention_mask_BT.to(device),
        position_ids=inputs.position_ids_BT.to(device),
        use_cache=False,
    ).logits
    return logits_BTV[:, -1, 0].cpu()
