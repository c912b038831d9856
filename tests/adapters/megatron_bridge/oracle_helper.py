"""A step of Megatron-Bridge's model in one process, each gated layer on kept rows by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from regate_ds.algorithm.plan import ElisionPlan, StepPlan
from tests.adapters.megatron import checks_helper as checks
from tests.adapters.megatron.build_helper import TOWERS, build, join, named
from tests.adapters.megatron.cases_helper import Case
from tests.adapters.megatron_bridge.models_helper import bare

Found = dict[str, Any]
"""``losses`` of each micro-batch [L], ``entropies`` [L], and ``gradients`` by name."""


def write_oracle(argument: tuple[Case, Path]) -> None:
    """Write what a step of the case is, in double precision and in single."""
    case, path = argument
    alone = replace(case, tp=1, pp=1, cp=1, dp=1, sp=False, recompute="none")
    join(alone)
    _, plan, _ = checks.plans_of(case)
    found = {str(dtype): _step(alone, case, plan, dtype) for dtype in (torch.double, torch.float)}
    torch.save(found, path)


def _step(alone: Case, case: Case, plan: StepPlan, dtype: torch.dtype) -> Found:
    model = bare(alone).to(dtype)
    decoder = model.language_model.decoder
    if case.recompute == "full" and not case.dense and hasattr(decoder, "_deepstack_process"):
        # The host's own mistake: Bridge 0.6.2 returns these features from its checkpoint in a list,
        # in which autograd does not see them. test_models.py shows it without us.
        add = decoder._deepstack_process
        decoder._deepstack_process = lambda x, mask, features: add(x, mask, features.detach())
    flat = [item for rank in checks.all_items(case) for item in rank]
    losses, entropies = [], []
    for item, micro in zip(flat, plan.micro, strict=True):
        losses_L, entropy_L = _losses(model, case, item.inputs, micro, dtype)
        losses.append(losses_L)
        entropies.append(entropy_L)
    (torch.cat(losses).sum() / plan.num_targets_global).backward()
    return {
        "losses": [losses_L.detach() for losses_L in losses],
        "entropies": entropies,
        "gradients": {n: p.grad for n, p in named(model).items() if p.grad is not None},
    }


def _losses(
    model: Any, case: Case, inputs: dict[str, Tensor], plan: ElisionPlan, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    kept_BT = torch.zeros(len(plan.kept_BK), plan.num_tokens, dtype=torch.bool)
    kept_BT.view(-1)[plan.position_R] = True
    for layer in model.language_model.decoder.layers[case.first_layer : case.last_layer]:
        layer.forward = _on_kept(type(layer).forward.__get__(layer), kept_BT)
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    logits_BTV = model(**given)
    logits_LV = logits_BTV.flatten(0, 1)[plan.label_position_L]
    losses_L = torch.nn.functional.cross_entropy(logits_LV, plan.targets_L, reduction="none")
    log_LV = logits_LV.detach().log_softmax(1)
    return losses_L, -(log_LV.exp() * log_LV).sum(1)


def _on_kept(forward: Callable[..., Any], kept_BT: Tensor) -> Callable[..., Any]:
    """A layer's forward, sample by sample on its kept rows; the others stay as they are."""

    def run(*, hidden_states: Tensor, rotary_pos_emb: Tensor, **rest: Any) -> Any:
        out_TBH = hidden_states.clone()
        for row, kept_T in enumerate(kept_BT):
            at = kept_T.nonzero().squeeze(1)
            angles = rotary_pos_emb[at, row : row + 1]
            kept = hidden_states[at, row : row + 1]
            y_K1H, _ = forward(hidden_states=kept, rotary_pos_emb=angles, **rest)
            out_TBH[at, row] = y_K1H[:, 0]
        return out_TBH, None

    return run


def _own_gradient(chunks: list[Any], name: str) -> Tensor:
    """A tensor whose gradient is the one that was found."""
    parameter = named(chunks[0].module)[name]
    own = torch.empty_like(parameter)
    own.grad = parameter.main_grad.clone()
    return own


def check_host_alone(argument: tuple[Case, Path]) -> str:
    """What the host's own dense step in the case's layout has wrong, against a dense oracle."""
    case, path = argument
    double = torch.load(path)[str(torch.double)]
    join(case)
    chunks = build(case)

    def step(iterator: Any, model: Any) -> Any:
        item = next(iterator)
        labels_BT = item.tokens.labels_BT
        losses_BT = model(**item.inputs, labels=labels_BT.clamp(min=0))
        is_label_BT = item.tokens.is_label_BT
        return losses_BT, lambda x_BT: ((x_BT * is_label_BT).sum(), is_label_BT.sum().int(), {})

    checks.run_chunks(case, chunks, get_forward_backward_func(), step)
    try:
        checks.check_gradients(chunks, _expected(double), dict)
    except AssertionError as problem:
        return str(problem)
    finally:
        checks.dismantle(chunks)
    return ""


def _expected(found: Found) -> dict[str, Tensor]:
    """Tensors with the oracle's gradients."""
    expected = {}
    for name, gradient in found["gradients"].items():
        expected[name] = torch.empty_like(gradient)
        expected[name].grad = gradient
    return expected


def check_against(argument: tuple[Case, Path]) -> checks.Report:
    """One step of the case in its own layout against what ``write_oracle`` wrote."""
    case, path = argument
    found = torch.load(path)
    double, single = found[str(torch.double)], found[str(torch.float)]
    regate, chunks = checks.run_step(case)
    session, plan, difficulty = checks.plans_of(case)
    checks.check_counts(case, regate, plan)
    report = checks.Report()

    def own() -> dict[str, float]:
        return {
            name: float((single["gradients"][name].double() - wanted).norm() / wanted.norm())
            for name, wanted in double["gradients"].items()
            if bool(wanted.any())
        }

    expected = _expected(double)
    if case.model == "qwen3_vl" and case.sp:
        # Those of the tower are the host's own mistake: test_models.py shows it without us.
        expected |= {n: _own_gradient(chunks, n) for n in expected if n.startswith(TOWERS)}
    report.gradient = checks.check_gradients(chunks, expected, own)
    report.loss = checks.check_losses(case, regate, double["losses"])
    regate.step(applied=True)
    each = zip(plan.micro, double["losses"], double["entropies"], strict=True)
    for micro, losses_L, entropy_L in each:
        session.record(micro, losses_L.float(), entropy=entropy_L.float())
    session.finish_step(applied=True)
    checks.check_difficulty(case, regate, difficulty)
    checks.dismantle(chunks)
    return report
