"""Time and memory of the head's loss with its gradients, beside torch's.

    python -m tests.cost.head_loss [ROUNDS]

The plain loss is ``cross_entropy`` of all targets' logits in fp32, and its backward pass; the two
take turns. Time is CPU seconds on one thread; memory is the most that operators hold at a time,
hidden states, weights and their own gradients' place apart.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regate_ds.algorithm.loss import summed_loss
from regate_ds.recipe.bench.measures import LiveBytes


@dataclass(frozen=True)
class Head:
    """The sizes of a head, and the number of its targets."""

    hidden: int
    vocabulary: int
    targets: int
    dtype: torch.dtype = torch.float32


HEADS = {
    "H 512, V 8k, L = 4 H": Head(512, 8192, 2048),
    "H 512, V 32k, L = H": Head(512, 32768, 512),
    "H 512, V 32k, L = 4 H": Head(512, 32768, 2048),
    "H 512, V 152k, L = 4 H": Head(512, 151_936, 2048),
    "H 1024, V 32k, L = 4 H": Head(1024, 32768, 4096),
}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden_LH: Tensor, weight_VH: Tensor, targets_L: Tensor) -> Tensor:
    logits_LV = torch.nn.functional.linear(hidden_LH, weight_VH).float()
    return torch.nn.functional.cross_entropy(logits_LV, targets_L, reduction="sum")


def ours(hidden_LH: Tensor, weight_VH: Tensor, targets_L: Tensor) -> Tensor:
    return summed_loss(hidden_LH, weight_VH, None, targets_L)[0]


def make(head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states [L, H], weights [V, H] and targets [L]."""
    torch.manual_seed(0)
    hidden_LH = torch.randn(head.targets, head.hidden, dtype=head.dtype, requires_grad=True)
    weight_VH = (torch.randn(head.vocabulary, head.hidden) * 0.02).to(head.dtype).requires_grad_()
    return hidden_LH, weight_VH, torch.randint(head.vocabulary, (head.targets,))


def peak_bytes(loss: Loss, head: Head) -> int:
    """Return the most bytes that the loss and its backward pass hold at a time."""
    inputs = make(head)
    with LiveBytes() as live:
        (loss(*inputs) / 7).backward()
    return live.peak


def cpu_seconds(head: Head, rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each turn, by the loss's name."""
    inputs, found = make(head), {"plain": [], "ours": []}
    for turn in range(rounds + 1):
        for name, loss in (("plain", plain), ("ours", ours)):
            begin = time.process_time()
            (loss(*inputs) / 7).backward()
            if turn:
                found[name].append(time.process_time() - begin)
            inputs[0].grad = inputs[1].grad = None
    return found


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    print("| head | time over plain | spread | peak MB: plain, ours | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for name, head in HEADS.items():
        seconds = cpu_seconds(head, rounds)
        ratios = [a / b for a, b in zip(seconds["ours"], seconds["plain"])]
        ratio = statistics.median(seconds["ours"]) / statistics.median(seconds["plain"])
        peaks = [peak_bytes(loss, head) for loss in (plain, ours)]
        megabytes = ", ".join(f"{peak / 1e6:.0f}" for peak in peaks)
        print(
            f"| {name} | {ratio:.2f} | {min(ratios):.2f} to {max(ratios):.2f} | {megabytes} "
            f"| {peaks[1] / peaks[0]:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
