"""The loss with its gradients against plain logits, and against others' kernels where they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regate_ds.algorithm.loss import summed_loss
from tests.gpu.check_helper import DTYPES, Check, Measured, Skipped
from tests.gpu.place_helper import why_missing

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def loss(device: torch.device) -> Iterator[Check | Skipped]:
    for name, dtype in DTYPES.items():
        for title, other in others().items():
            if isinstance(other, str):
                if name == "fp32":
                    yield Skipped(title, other)
                continue
            yield Check(f"gradients against {title}", name, partial(agrees, other, device, dtype))
            yield Check(f"time and peak over {title}", name, partial(costs, other, device, dtype))


def others() -> dict[str, Loss | str]:
    """Losses to compare with; of those that are not there, why."""
    found: dict[str, Loss | str] = {"plain logits": plain}
    missing = why_missing("liger_kernel")
    found["Liger's fused loss"] = missing or liger
    missing = why_missing("cut_cross_entropy")
    found["cut-cross-entropy"] = missing or cut
    return found


def plain(hidden_LH: Tensor, weight_VH: Tensor, targets_L: Tensor) -> Tensor:
    return F.cross_entropy((hidden_LH @ weight_VH.T).float(), targets_L, reduction="sum")


def ours(hidden_LH: Tensor, weight_VH: Tensor, targets_L: Tensor) -> Tensor:
    return summed_loss(hidden_LH, weight_VH, None, targets_L)[0]


def liger(hidden_LH: Tensor, weight_VH: Tensor, targets_L: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight_VH, hidden_LH, targets_L)


def cut(hidden_LH: Tensor, weight_VH: Tensor, targets_L: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden_LH, weight_VH, targets_L, reduction="sum")


def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    is_cpu = device.type == "cpu"
    rows, hidden, vocabulary = (600, 64, 500) if is_cpu else (8192, 4096, 152_064)
    torch.manual_seed(0)
    made = {"device": device, "dtype": dtype}
    hidden_LH = torch.randn(rows, hidden, **made).requires_grad_()
    weight_VH = (0.02 * torch.randn(vocabulary, hidden, **made)).requires_grad_()
    return hidden_LH, weight_VH, torch.randint(vocabulary, (rows,), device=device)


def gradients_of(function: Loss, given: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    function(*given).backward()
    found = [one.grad.float() for one in given[:2]]
    for one in given[:2]:
        one.grad = None
    return found


def agrees(other: Loss, device: torch.device, dtype: torch.dtype) -> Measured:
    given = inputs(device, dtype)
    wanted, found = gradients_of(other, given), gradients_of(ours, given)
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
    return Measured(error, 1e-5 if dtype == torch.float32 else 0.02)


def costs(other: Loss, device: torch.device, dtype: torch.dtype) -> Measured:
    """Our time over the other's; on a CPU it is no matter of a check."""
    given = inputs(device, dtype)
    seconds, peaks = {}, {}
    for name, function in (("other", other), ("ours", ours)):
        gradients_of(function, given)
        seconds[name], peaks[name] = measured(partial(gradients_of, function, given), device)
    ratio = seconds["ours"] / seconds["other"]
    is_cuda = device.type == "cuda"
    peak = f", peak {peaks['ours'] / peaks['other']:.3f}" if is_cuda else ""
    bound = 1.0 if is_cuda and other is plain else float("inf")
    return Measured(ratio, bound, f"time {ratio:.3f}{peak}")


def measured(call: Callable[[], Any], device: torch.device) -> tuple[float, int]:
    if device.type == "cpu":
        begin = time.process_time()
        call()
        return time.process_time() - begin, 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin, torch.cuda.max_memory_allocated() - before
