"""What is switched off changes no bit of a Hugging Face model: outputs, gradients, attributes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.adapters.huggingface.gates import attach_model
from regate_ds.adapters.torch.attach import attach
from regate_ds.algorithm.batch import host_labels
from regate_ds.algorithm.plan import plan_dense
from regate_ds.config import RegateConfig
from tests.adapters.huggingface.gated_cases_helper import Case
from tests.gpu.check_helper import DTYPES, Check, Measured, num_different
from tests.gpu.decoder_helper import Student, on, students
from tests.gpu.place_helper import REPEATABLE
from tests.support.measure import gradients

Outputs = dict[str, Tensor]
Look = Callable[[nn.Module, Case], Outputs]


def off(device: torch.device) -> Iterator[Check]:
    for student in students():
        for name, dtype in DTYPES.items():
            for title, measure in CHECKS.items():
                run = partial(measure, student, device, dtype)
                yield Check(title, name, run, student.name)


def disabled(student: Student, device: torch.device, dtype: torch.dtype) -> Measured:
    def change(model: nn.Module) -> None:
        before = own_attributes(model)
        attach(model, RegateConfig(enabled=False), total_steps=4)
        assert own_attributes(model) == before, "attach touched the model"

    return compared(student, device, dtype, change)


def without_a_plan(student: Student, device: torch.device, dtype: torch.dtype) -> Measured:
    return compared(student, device, dtype, attach_model)


def removed(student: Student, device: torch.device, dtype: torch.dtype) -> Measured:
    def change(model: nn.Module) -> None:
        before, names = own_attributes(model), list(model.state_dict())
        attach_model(model, run_tower_without_image=True).remove()
        assert own_attributes(model) == before, "remove left something on the model"
        assert list(model.state_dict()) == names, "remove left other names of weights"

    return compared(student, device, dtype, change)


def dense_plan(student: Student, device: torch.device, dtype: torch.dtype) -> Measured:
    """Measure what the decoder returns under a dense plan: the head runs at targets alone."""

    def planned(model: nn.Module, case: Case) -> Outputs:
        plan = plan_dense(case.batch).to(case.input_ids.device)
        return {"hidden": hidden_states(model, partial(replace(case, plan=plan).run, model))}

    def plain(model: nn.Module, case: Case) -> Outputs:
        call = partial(model, input_ids=case.input_ids, use_cache=False, **case.inputs)
        return {"hidden": hidden_states(model, call)}

    return compared(student, device, dtype, attach_model, plain, planned)


def look(model: nn.Module, case: Case) -> Outputs:
    """Logits, loss and gradients of the host's own call."""
    model.zero_grad()
    labels = host_labels(case.batch.labels_BT).to(case.input_ids.device)
    output = model(input_ids=case.input_ids, labels=labels, **case.inputs)
    output.loss.backward()
    return {"logits": output.logits.detach(), "loss": output.loss.detach(), **gradients(model)}


def hidden_states(model: nn.Module, call: Callable[[], Any]) -> Tensor:
    seen: list[Tensor] = []
    decoder = model.get_decoder()
    hook = decoder.register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state))
    try:
        call()
    finally:
        hook.remove()
    (hidden_BTH,) = seen
    return hidden_BTH.detach()


def own_attributes(model: nn.Module) -> dict[str, tuple[type, dict[str, int]]]:
    """Class, and identities of everything that an instance holds itself, module by module."""
    return {
        name: (type(module), {k: id(v) for k, v in vars(module).items() if k[0] != "_"})
        for name, module in model.named_modules()
    }


def compared(
    student: Student,
    device: torch.device,
    dtype: torch.dtype,
    change: Callable[[nn.Module], Any],
    plain: Look = look,
    ours: Look = look,
) -> Measured:
    """Elements that differ between the host's model and a copy that ``change`` was done to.

    Only where the host's model repeats itself bit for bit does that say anything.
    """
    host = student.make().to(device, dtype)
    changed = copy.deepcopy(host)
    change(changed)
    case = on(student.case, device, dtype)
    for name, repeatable in REPEATABLE.items():
        with repeatable():
            try:
                expected, again = plain(host, case), plain(host, case)
                found = ours(changed, case)
            except RuntimeError as problem:
                if "deterministic" not in str(problem):
                    raise
                continue
            if num_different(again, expected) == 0:
                return Measured(num_different(found, expected), 0.0, name)
    raise RuntimeError("the host's own model gives other numbers each time it is run")


CHECKS = {
    "attached with enabled=False": disabled,
    "attached, called without a plan": without_a_plan,
    "hidden states of a dense plan": dense_plan,
    "after remove()": removed,
}
