"""Each family as people train it, against the same oracle: activations recomputed, and adapters.

Answers are elided, and images where there are some. Each use has one attention and one gated range.
A use that fails is tried on the host alone, without the adapter; what the host cannot do is said in
the row, ``"host: ..."``, and is no fault of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.families.rows import TOLERANCE, Row, add_errors, add_failure, attached
from tests.families.zoo.cases import Case, cases_of
from tests.families.zoo.compare import Run, backward, gradient_error, loss_error, oracle_run
from tests.families.zoo.fp64 import in_fp64
from tests.families.zoo.models.family import Family, attentions_of, build
from tests.families.zoo.oracle import decoder_of, host_loss

WHOLE, BEHIND_FIRST, LATE, INNER = range(0, 4), range(1, 4), range(2, 4), range(1, 3)


@dataclass(frozen=True, kw_only=True)
class Use:
    """One way to train a model."""

    name: str
    gated: range
    attention: int
    """Which of the class's attention implementations: the first or the last."""

    lora: bool = False
    reentrant: bool | None = None
    """How activations are recomputed; None if they are kept."""


USES = (
    Use(name="checkpointing", gated=BEHIND_FIRST, attention=0, reentrant=False),
    Use(name="reentrant checkpointing", gated=INNER, attention=-1, reentrant=True),
    Use(name="LoRA", gated=LATE, attention=-1, lora=True),
    Use(name="LoRA, checkpointing", gated=INNER, attention=0, lora=True, reentrant=False),
)


class HostFault(Exception):
    """The host itself cannot be used so."""


def measure_uses(family: Family, row: Row) -> None:
    """Add every use to the row, by name in ``uses``: "exact", "wrong" or "host: ..."."""
    row["uses"] = {}
    for use in USES:
        row["at"] = use.name
        with in_fp64():
            row["uses"][use.name] = measured(family, use, row)


def measured(family: Family, use: Use, row: Row) -> str:
    """Return how one use fared, and add its errors to the row. Call it within ``in_fp64``."""
    host: Any = build(family, attentions_of(family)[use.attention])
    case = cases_of(family, host)[0]
    plan = case.plan("answers" if case.batch.image_BT is None else "answers and images")
    gated = next(one for one in (use.gated, WHOLE) if _takes(host, one, row["execution"]))
    row["at"] = f"{use.name}, [{gated.start}, {gated.stop})"
    try:
        model = with_lora(host) if use.lora else host
        wanted = oracle_run(host, case.inputs, plan, gated, row["execution"])
        if use.reentrant is not None:
            recompute(host, reentrant=use.reentrant)
    except Exception as error:  # nothing is attached yet
        return f"host: {_said(error)}"
    try:
        with attached(model, gated, row["execution"]):
            found = used_run(host, use, lambda: model(**case.inputs, regate_plan=plan).loss_sum)
    except Exception as error:  # part of the row, as the run goes on
        if fault := host_fault(host, use, case):
            return f"host: {fault}"
        add_failure(row, error)
        return "failed"
    worst = max(loss_error(found, wanted), gradient_error(found, wanted)[0])
    if not worst <= TOLERANCE and (fault := host_fault(host, use, case)):
        return f"host: {fault}"
    add_errors(row, found, wanted)
    return "exact" if worst <= TOLERANCE else "wrong"


def _takes(host: nn.Module, gated: range, execution: str) -> bool:
    """Return whether the range is one of the model's: layers may read each other's keys."""
    try:
        with attached(host, gated, execution):
            return True
    except ValueError:
        return False


def recompute(host: Any, *, reentrant: bool) -> None:
    """Let the host recompute activations, in fp64 as everything: a backward pass leaves that."""
    host.gradient_checkpointing_enable({"use_reentrant": reentrant})
    host.enable_input_require_grads()
    for module in host.modules():
        if (checkpoint := getattr(module, "_gradient_checkpointing_func", None)) is not None:
            module._gradient_checkpointing_func = partial(_in_fp64, checkpoint)


def _in_fp64(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(in_fp64()(function), *args)


def with_lora(host: Any) -> Any:
    """Adapt every linear layer of the decoder. Both factors are random, as peft has one at 0."""
    inner = {id(module) for layer in decoder_of(host).layers for module in layer.modules()}
    linear = [n for n, m in host.named_modules() if id(m) in inner and type(m) is nn.Linear]
    model = get_peft_model(host, LoraConfig(r=2, lora_alpha=4, target_modules=linear))
    generator = torch.Generator().manual_seed(2)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert "lora_" in name
            drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.data.copy_(drawn / weight.shape[1] ** 0.5)
    return model.train()


def used_run(host: Any, use: Use, loss_of: Any) -> Run:
    """Return loss and gradients; HostFault if layers were not recomputed, or adapters not used."""
    layers, again = decoder_of(host).layers, set()
    loss: Tensor = loss_of()
    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            for child in layer.children():
                hook = child.register_forward_pre_hook(lambda *_, number=number: again.add(number))
                stack.callback(hook.remove)
        run = backward(host, loss)
    expected = set() if use.reentrant is None else set(range(len(layers)))
    if again != expected:
        raise HostFault(f"of its {len(layers)} layers, {sorted(again)} are run again")
    if use.lora and (idle := _without_gradient(host, run)):
        raise HostFault(f"adapters of layers {idle} get no gradient")
    return run


def _without_gradient(host: Any, run: Run) -> list[int]:
    """Return the decoder layers of which no weight has a gradient other than 0."""
    moved = {id(w) for n, w in host.named_parameters() if n in run.gradients and _is_used(run, n)}
    layers = enumerate(decoder_of(host).layers)
    return [n for n, layer in layers if not any(id(w) in moved for w in layer.parameters())]


def _is_used(run: Run, name: str) -> bool:
    return bool(run.gradients[name].any())


def host_fault(host: Any, use: Use, case: Case) -> str | None:
    """Return what is wrong with the host in this use, without the adapter; None if nothing is."""
    try:
        found = used_run(host, use, lambda: host_loss(host, case.inputs, case.batch))
    except Exception as error:
        return _said(error)
    host.gradient_checkpointing_disable()
    wanted = backward(host, host_loss(host, case.inputs, case.batch))
    error, where = gradient_error(found, wanted)
    return None if error <= TOLERANCE else f"its own gradient of {where} is wrong by {error:.0e}"


def _said(error: Exception) -> str:
    line = str(error).split("\n")[0][:200]
    return line if isinstance(error, HostFault) else f"{type(error).__name__}: {line}"
