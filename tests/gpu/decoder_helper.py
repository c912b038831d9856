"""Gated Hugging Face decoders on the device against the per-layer oracle, in fp32 and in bf16."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from regate_ds.algorithm.batch import host_labels
from tests.adapters.huggingface.gated_cases_helper import (
    TOLERANCE,
    Case,
    Embed,
    embed_llava,
    embed_text,
    exact_run,
    fast_run,
    llava_case,
    text_case,
)
from tests.gpu.check_helper import Check, Measured, Skipped
from tests.gpu.place_helper import why_missing
from tests.support.measure import Gradients, errors, gradients, relative_error
from tests.support.models import causal_lm, llava
from tests.support.planning import gate_layers

GATED = range(1, 3)
MOST_IN_FP32, MOST_IN_BF16 = 5e-5, 0.06
"""Bounds that no rounding of the plain model's own may raise."""

ROWS = {"padded": [[20], [9]], "packed": [[9, 11], [13, 4, 3]]}


@dataclass(frozen=True)
class Student:
    """A small model, and a micro-batch for it."""

    name: str
    make: Callable[[], nn.Module]
    case: Case
    embed: Embed = embed_text


def students(attentions: tuple[str, ...] = ("sdpa", "eager")) -> Iterator[Student]:
    for attention, (rows, sizes) in itertools.product(attentions, ROWS.items()):
        for kind in ("llama", "qwen2"):
            make = partial(causal_lm, kind, attention)
            yield Student(f"{kind} {attention} {rows}", make, text_case(sizes))
        # Padded rows have images that touch, and elide half of their tokens.
        name, make = f"llava {attention} {rows}", partial(llava, attention)
        case = llava_case([[12, 7], [13]], [1, 1])
        if rows == "padded":
            case = llava_case([[20], [13]], [2, 1], image_share=0.5)
        yield Student(name, make, case, embed_llava)


def oracle(device: torch.device) -> Iterator[Check | Skipped]:
    for student in students():
        exact, step = (partial(f, student, device) for f in (exactness, bf16_step))
        yield Check("loss and gradients", "fp32", exact, student.name)
        yield Check("a training step", "bf16", step, student.name)
    missing = why_missing("flash_attn") if device.type == "cuda" else "it needs a GPU"
    if missing:
        yield Skipped("flash_attention_2", missing)
        return
    for student in students(("flash_attention_2",)):
        yield Check("a training step", "bf16", partial(bf16_step, student, device), student.name)


def on(case: Case, device: torch.device, dtype: torch.dtype = torch.float32) -> Case:
    """The micro-batch as a model on the device takes it; ``batch`` stays where plans are made."""
    inputs = {
        name: x.to(device, dtype if x.is_floating_point() else x.dtype)
        for name, x in case.inputs.items()
    }
    placed = {"input_ids": case.input_ids.to(device), "plan": case.plan.to(device)}
    return replace(case, inputs=inputs, **placed)


def exactness(student: Student, device: torch.device) -> Measured:
    """Error of the loss, or of the worst tensor of gradients; sparse and dense.

    Allowed are 5e-6, or three times what fp32 makes of the plain model's gradients on this device.
    """
    model = student.make().to(device)
    found = [
        _exactness(model, on(case, device), student.embed)
        for case in (student.case, student.case.dense)
    ]
    error = max(found)
    if error <= TOLERANCE:
        return Measured(error, TOLERANCE)
    case = on(student.case, device)
    exact = plain_run(copy.deepcopy(model).double(), on(student.case, device, torch.float64))
    own = _per_tensor(plain_run(model, case), exact)
    return Measured(
        error, min(max(TOLERANCE, 3 * own), MOST_IN_FP32), f"plain fp32 is off by {own:.1e}"
    )


def _exactness(model: nn.Module, case: Case, embed: Embed) -> float:
    # The oracle makes masks and positions of its own.
    with torch.device(case.input_ids.device):
        wanted_loss, wanted = exact_run(model, case, GATED, embed=embed)
    found_loss, found = fast_run(model, case, GATED)
    loss_error = abs(found_loss - wanted_loss) / abs(wanted_loss)
    return max(loss_error, _per_tensor(found, wanted))


def _per_tensor(found: Gradients, expected: Gradients) -> float:
    """The largest ||g - g*|| / ||g*||, with a floor for gradients that are 0 in theory."""
    rows = list(errors(found, expected))
    floor = 0.02 * math.sqrt(sum(size**2 for _, _, size in rows))
    return max(error / (size + floor) for _, error, size in rows)


def plain_run(model: nn.Module, case: Case) -> Gradients:
    """The host's own loss over all targets, without elision."""
    plain = copy.deepcopy(model)
    labels = host_labels(case.batch.labels_BT).to(case.input_ids.device)
    plain(input_ids=case.input_ids, labels=labels, **case.inputs).loss.backward()
    return gradients(plain)


def bf16_step(student: Student, device: torch.device) -> Measured:
    """Errors of a bf16 step's loss and gradients, against fp32 on the same, rounded weights.

    Allowed is twice what bf16 makes of the plain model's gradients without elision, and 2^-8, the
    rounding of one number. Infinite where the step leaves a weight that is not finite.
    """
    low = student.make().to(device, torch.bfloat16)
    high = copy.deepcopy(low).float()
    if high.get_decoder().config._attn_implementation == "flash_attention_2":
        high.get_decoder().config._attn_implementation = "sdpa"  # The kernels have no fp32.
    case, exact_case = on(student.case, device, torch.bfloat16), on(student.case, device)
    own = relative_error(plain_run(low, case), plain_run(high, exact_case))
    wanted_loss, wanted = fast_run(high, exact_case, GATED)
    found_loss, found, is_finite = train(low, case)
    loss_error = abs(found_loss - wanted_loss) / abs(wanted_loss)
    error = max(relative_error(found, wanted), loss_error) if is_finite else math.inf
    bound = min(2 * own + 2**-8, MOST_IN_BF16)
    return Measured(error, bound, f"plain bf16 is off by {own:.1e}")


def train(model: nn.Module, case: Case) -> tuple[float, Gradients, bool]:
    """Loss and gradients of one step of gradient descent, and whether all weights stay finite."""
    model = copy.deepcopy(model)
    gate_layers(model, first_layer=GATED.start, last_layer=GATED.stop)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = case.run(model).loss_sum
    loss.backward()
    found = gradients(model)
    optimizer.step()
    return loss.item(), found, all(bool(p.isfinite().all()) for p in model.parameters())
