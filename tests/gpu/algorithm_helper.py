"""What needs torch only: plans, the gate and the loss on the device.

Shapes: B rows, T positions, K slots, N label positions, H hidden, L targets, V vocabulary.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regate_ds.adapters.attachment import Attachment
from regate_ds.algorithm.gate import keep, restore
from regate_ds.algorithm.loss import CHUNK, summed_loss, token_losses
from regate_ds.algorithm.plan import ElisionPlan, plan_dense
from tests.algorithm.plain_plan_helper import plain_kept, plain_ragged, rows_of, wild_batch
from tests.gpu.check_helper import DTYPES, Check, Measured, num_different, worst
from tests.support.measure import gradients
from tests.support.planning import plan_ragged, plan_sparse

KNOBS = list(itertools.product((1e-6, 0.3, 1.0), ("predictor", "target", "both"), (1, 4)))
HIDDEN, VOCABULARY, NUM_TARGETS = 64, 96, CHUNK + 37

MOST = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
"""Up to here torch's own cross-entropy is a yardstick: a wrong oracle would raise its error."""


def oracle(device: torch.device) -> Iterator[Check]:
    yield Check("padded plans", "int64", partial(plans, device, plan_sparse, plain_kept))
    yield Check("ragged plans", "int64", partial(plans, device, plan_ragged, plain_ragged))
    yield Check("a moved plan is the same plan", "int64", partial(moved_plans, device))
    for name, dtype in DTYPES.items():
        yield Check("keep and restore, and gradients", name, partial(gate, device, dtype))
        for loss, bias in itertools.product((summed, weighted), (False, True)):
            title = f"{loss.__name__} loss, {'a' if bias else 'no'} bias, and gradients"
            yield Check(title, name, partial(head_error, device, dtype, loss, bias))


def off(device: torch.device) -> Iterator[Check]:
    for name, dtype in DTYPES.items():
        yield Check("the gate of a dense plan is no gate", name, partial(dense_gate, device, dtype))
        yield Check("a module after remove()", name, partial(removed, device, dtype))


def random_scores(num_labels: int, rng: random.Random) -> Tensor:
    """Few distinct values, so that ties are common."""
    return torch.tensor([rng.randrange(-1, 4) / 3 for _ in range(num_labels)])


def plans(device: torch.device, make: Callable[..., ElisionPlan], plain: Any) -> Measured:
    """How many plans, read back from the device, are not what a walk over each sample keeps."""
    rng, num_wrong = random.Random(0), 0
    for (share, align, multiple), _ in itertools.product(KNOBS, range(8)):
        batch = wild_batch(rng)
        score_N = random_scores(int(batch.is_label_BT.sum()), rng)
        how = {"keep_share": share, "align": align}
        plan = make(batch, score_N, **how, token_multiple=multiple).to(device)
        expected = plain(batch, score_N, **how, multiple=multiple)
        num_wrong += (rows_of(plan), plan.num_filled) != expected
    return Measured(num_wrong, 0.0)


def random_plan(rng: random.Random) -> ElisionPlan:
    batch = wild_batch(rng)
    score_N = random_scores(int(batch.is_label_BT.sum()), rng)
    return plan_sparse(batch, score_N, keep_share=0.3, align="predictor", token_multiple=4)


def moved_plans(device: torch.device) -> Measured:
    rng, num_wrong = random.Random(1), 0
    for _ in range(20):
        plan = random_plan(rng)
        for name, value in vars(plan.to(device)).items():
            expected = getattr(plan, name)
            if isinstance(expected, Tensor):
                right = value.device.type == device.type and torch.equal(value.cpu(), expected)
                num_wrong += not right
            else:
                num_wrong += value != expected
    return Measured(num_wrong, 0.0)


def gate(device: torch.device, dtype: torch.dtype) -> Measured:
    """Elements that differ from a walk over positions. Doubling is exact in any precision."""
    rng, num_wrong = random.Random(2), 0
    torch.manual_seed(0)
    for _ in range(20):
        plan = random_plan(rng)
        rows = rows_of(plan)
        size = (len(rows), plan.num_tokens, 8)
        x_BTH, upstream_BTH = (torch.randn(size).to(device, dtype) for _ in range(2))
        placed = plan.to(device)
        packed = keep(x_BTH.requires_grad_(), placed)
        out_BTH = restore(x_BTH, packed * 2, placed)
        (gradient,) = torch.autograd.grad(out_BTH, x_BTH, upstream_BTH)
        factor_BTH = torch.ones_like(x_BTH)
        for r, row in enumerate(rows):
            factor_BTH[r, row] = 2.0
            num_wrong += int((packed[r, : len(row)] != x_BTH[r, row]).sum())
        num_wrong += int((out_BTH != x_BTH * factor_BTH).sum())
        num_wrong += int((gradient != upstream_BTH * factor_BTH).sum())
    return Measured(num_wrong, 0.0)


def summed(hidden_LH: Tensor, weight_VH: Tensor, bias_V: Any, targets_L: Tensor, _: Tensor) -> Any:
    return summed_loss(hidden_LH, weight_VH, bias_V, targets_L)[:2]


def weighted(
    hidden_LH: Tensor, weight_VH: Tensor, bias_V: Any, targets_L: Tensor, share_L: Tensor
) -> Any:
    losses_L, _ = token_losses(hidden_LH, weight_VH, bias_V, targets_L)
    return (losses_L * share_L).sum(), losses_L


def plain_losses(hidden_LH: Tensor, weight_VH: Tensor, bias_V: Any, targets_L: Tensor) -> Tensor:
    """One target after the other."""
    losses = []
    for hidden_H, target in zip(hidden_LH, targets_L.tolist(), strict=True):
        logits_V = weight_VH @ hidden_H if bias_V is None else weight_VH @ hidden_H + bias_V
        losses.append(logits_V.logsumexp(0) - logits_V[target])
    return torch.stack(losses)


def head_error(device: torch.device, dtype: torch.dtype, loss: Any, bias: bool) -> Measured:
    """Relative errors of losses and gradients, against one target after the other in fp64.

    Allowed are twice those of torch's own cross-entropy in the same precision, up to MOST, and the
    rounding of a result.
    """
    torch.manual_seed(3)
    sizes = [(NUM_TARGETS, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,)][: 2 + bias]
    made = [torch.randn(size).div(size[-1] ** 0.25).to(device, dtype) for size in sizes]
    targets_L = torch.randint(VOCABULARY, (NUM_TARGETS,))
    share_L = torch.rand(NUM_TARGETS).double() if loss is weighted else torch.ones(NUM_TARGETS)

    def run(leaves: list[Tensor], losses_of: Callable[..., Any]) -> list[Tensor]:
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        hidden, weight, bias_V = leaves if bias else [*leaves, None]
        at = hidden.device
        total, losses_L = losses_of(hidden, weight, bias_V, targets_L.to(at), share_L.to(at))
        return [losses_L.detach(), *torch.autograd.grad(total, leaves)]

    def by_walk(hidden: Tensor, weight: Tensor, bias_V: Any, targets_L: Any, share_L: Any) -> Any:
        losses_L = plain_losses(hidden, weight, bias_V, targets_L)
        return (losses_L * share_L).sum(), losses_L

    def by_torch(hidden: Tensor, weight: Tensor, bias_V: Any, targets_L: Any, share_L: Any) -> Any:
        logits_LV = F.linear(hidden, weight, bias_V).float()
        losses_L = F.cross_entropy(logits_LV, targets_L, reduction="none")
        return (losses_L * share_L).sum(), losses_L

    exact = run([leaf.double().cpu() for leaf in made], by_walk)
    ours, host = run(made, loss), run(made, by_torch)
    rounding = torch.finfo(dtype).eps / 2
    return worst(
        Measured(
            _relative(mine, wanted), min(2 * _relative(theirs, wanted), MOST[dtype]) + rounding
        )
        for mine, theirs, wanted in zip(ours, host, exact, strict=True)
    )


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double().cpu() - exact).norm() / exact.norm())


def dense_gate(device: torch.device, dtype: torch.dtype) -> Measured:
    """Calls of the gate, of two, that do not give back what they were given."""
    batch = wild_batch(random.Random(4))
    plan = plan_dense(batch).to(device)
    x_BTH = torch.randn(*batch.labels_BT.shape, 8).to(device, dtype)
    y_BTH = torch.randn_like(x_BTH)
    moved = [keep(x_BTH, plan) is not x_BTH, restore(x_BTH, y_BTH, plan) is not y_BTH]
    return Measured(sum(moved), 0.0)


def removed(device: torch.device, dtype: torch.dtype) -> Measured:
    """Elements of outputs and gradients that differ with a wrapper that passes on, and after it."""
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).to(device, dtype)
    x_BH = torch.randn(5, 16).to(device, dtype)

    def look(module: nn.Module) -> dict[str, Tensor]:
        module.zero_grad()
        out_BH = module(x_BH)
        out_BH.square().sum().backward()
        return {"out": out_BH.detach(), **gradients(module)}

    expected, ours, attachment = look(copy.deepcopy(host)), copy.deepcopy(host), Attachment()
    before = [sorted(vars(module)) for module in ours.modules()]
    for module in ours:
        attachment.rebind_forward(module, lambda forward, x: forward(x))
    during = look(ours)
    attachment.remove()
    assert [sorted(vars(module)) for module in ours.modules()] == before
    num_wrong = num_different(during, expected) + num_different(look(ours), expected)
    return Measured(num_wrong, 0.0)
