"""The chunked loss against torch's cross-entropy, and what it holds in memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regate_ds.algorithm.entropy import entropy_of, joined_entropy
from regate_ds.algorithm.loss import CHUNK, LogitChange, summed_loss, token_losses

HIDDEN, VOCABULARY = 6, 11
CHANGES = [LogitChange(), LogitChange(scale=0.3), LogitChange(scale=2.0, cap=1.5)]


class Head:
    """Random inputs of the loss in fp64; ``leaves`` are those that get a gradient."""

    def __init__(self, num_targets: int, *, bias: bool = False, dtype=torch.float64) -> None:
        torch.manual_seed(num_targets)
        shapes = [(num_targets, HIDDEN), (VOCABULARY, HIDDEN), (VOCABULARY,)]
        made = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
        self.hidden, self.weight, self.bias = made[0], made[1], made[2] if bias else None
        self.leaves = made if bias else made[:2]
        self.targets = torch.randint(VOCABULARY, (num_targets,))
        self.inputs = (self.hidden, self.weight, self.bias, self.targets)

    def expected(self) -> Tensor:
        logits = F.linear(self.hidden, self.weight, self.bias)
        return F.cross_entropy(logits, self.targets, reduction="none")


def assert_gradients(found: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    wanted = torch.autograd.grad(expected, leaves)
    for mine, want in zip(torch.autograd.grad(found, leaves), wanted, strict=True):
        assert torch.allclose(mine, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_targets", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7])
@pytest.mark.parametrize("bias", [False, True])
def test_summed_loss_and_its_gradients_are_those_of_cross_entropy(num_targets: int, bias: bool):
    head = Head(num_targets, bias=bias)
    total, losses, _ = summed_loss(*head.inputs)
    assert torch.allclose(losses, head.expected(), rtol=1e-12)
    assert torch.equal(total, losses.sum())
    assert_gradients(3 * total, 3 * head.expected().sum(), head.leaves)


@pytest.mark.parametrize("num_targets", [0, 5, CHUNK + 1])
@pytest.mark.parametrize("change", [LogitChange(scale=0.3), LogitChange(scale=2.0, cap=1.5)])
def test_scaled_and_capped_logits_have_the_gradients_of_what_the_host_writes(
    num_targets: int, change: LogitChange
):
    head, weights = Head(num_targets, bias=True), torch.rand(num_targets).double()

    def expected() -> Tensor:
        logits = F.linear(head.hidden, head.weight, head.bias) * change.scale
        if change.cap is not None:
            logits = torch.tanh(logits / change.cap) * change.cap
        return F.cross_entropy(logits, head.targets, reduction="none")

    total, losses, _ = summed_loss(*head.inputs, share_L=weights, change=change)
    assert torch.allclose(losses, expected(), rtol=1e-12)
    assert_gradients(total, (expected() * weights).sum(), head.leaves)
    if num_targets:
        losses, _ = token_losses(*head.inputs, change=change)
        assert_gradients((losses * weights).sum(), (expected() * weights).sum(), head.leaves)


@pytest.mark.parametrize("num_targets", [0, 5, CHUNK + 1])
@pytest.mark.parametrize("change", CHANGES)
def test_entropies_are_those_of_log_softmax_on_all_logits(num_targets: int, change: LogitChange):
    head = Head(num_targets, bias=True)
    log_share = change.apply(F.linear(head.hidden, head.weight, head.bias)).log_softmax(1)
    wanted = -(log_share.exp() * log_share).sum(1)
    _, _, summed = summed_loss(*head.inputs, change=change, with_entropy=True)
    _, alone = token_losses(*head.inputs, change=change, with_entropy=True)
    for found in (summed, alone):
        assert found is not None
        assert not found.requires_grad
        assert torch.allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize("num_targets", [0, 5, CHUNK + 1])
@pytest.mark.parametrize("change", CHANGES)
def test_a_target_is_on_top_where_no_logit_is_larger(num_targets: int, change: LogitChange):
    head = Head(num_targets, bias=True)
    likeliest = F.linear(head.hidden, head.weight, head.bias).argmax(1)
    targets = torch.where(torch.arange(num_targets) % 3 == 0, likeliest, head.targets)
    found = torch.zeros(num_targets, dtype=torch.bool)
    summed_loss(*head.inputs[:3], targets, change=change, top1_L=found)
    assert torch.equal(found, likeliest == targets)


@pytest.mark.parametrize("change", CHANGES)
def test_losses_and_gradients_are_the_same_bit_for_bit_with_and_without_entropies(change):
    found = []
    for with_entropy in (False, True):
        head = Head(CHUNK + 3, bias=True, dtype=torch.float32)
        weights = torch.rand(CHUNK + 3, generator=torch.Generator().manual_seed(1))
        seen = {"with_entropy": with_entropy}
        seen["top1_L"] = torch.zeros(CHUNK + 3, dtype=torch.bool) if with_entropy else None
        total, losses, _ = summed_loss(*head.inputs, weights, change, **seen)
        own, _ = token_losses(*head.inputs, change, with_entropy=with_entropy)
        gradients = [torch.autograd.grad(x, head.leaves) for x in (total, (own * weights).sum())]
        found.append([total, losses, own, *gradients[0], *gradients[1]])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_entropy_of_large_logits_is_neither_infinite_nor_lost():
    hidden, weight = torch.tensor([[300.0], [0.0]]), torch.tensor([[1.0], [0.0], [-1.0]])
    *_, entropy = summed_loss(hidden, weight, None, torch.tensor([0, 0]), with_entropy=True)
    assert entropy is not None
    assert entropy.tolist() == pytest.approx([0.0, math.log(3)])


@pytest.mark.parametrize("sizes", [[11], [5, 6], [1, 3, 7]])
def test_parts_of_the_vocabulary_join_to_the_entropy_of_the_whole(sizes: list[int]):
    logits = 4 * torch.randn(9, 11, generator=torch.Generator().manual_seed(2)).double()
    parts = logits.split(sizes, dim=1)
    own = torch.stack([part.logsumexp(1) for part in parts])
    found = joined_entropy(own, torch.stack([entropy_of(part) for part in parts]))
    assert torch.allclose(found, entropy_of(logits), rtol=1e-12)


@pytest.mark.parametrize("num_targets", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("bias", [False, True])
def test_token_losses_take_any_weights_of_the_user(num_targets: int, bias: bool):
    head = Head(num_targets, bias=bias)
    weights = torch.rand(num_targets).double()
    losses, _ = token_losses(*head.inputs)
    assert torch.allclose(losses, head.expected(), rtol=1e-12)
    if num_targets:
        assert_gradients((losses * weights).sum(), (head.expected() * weights).sum(), head.leaves)


def test_no_targets_still_give_the_hidden_state_a_gradient_of_zero():
    head = Head(0)
    (gradient,) = torch.autograd.grad(token_losses(*head.inputs)[0].sum(), head.hidden)
    assert gradient.shape == (0, HIDDEN)


def test_the_losses_beside_the_sum_are_detached():
    head = Head(4)
    total, losses, _ = summed_loss(*head.inputs)
    assert total.requires_grad
    assert not losses.requires_grad


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen: str):
    head, whole = Head(9), Head(9)
    getattr(head, frozen).requires_grad_(False)
    other = "hidden" if frozen == "weight" else "weight"
    summed_loss(*head.inputs)[0].backward()
    summed_loss(*whole.inputs)[0].backward()
    assert getattr(head, frozen).grad is None
    assert torch.equal(getattr(head, other).grad, getattr(whole, other).grad)


def test_nothing_is_kept_for_a_backward_pass_that_cannot_come():
    with torch.no_grad():
        total, losses, _ = summed_loss(*Head(9).inputs)
    assert not total.requires_grad
    assert torch.allclose(losses, Head(9).expected())


def test_large_logits_neither_overflow_nor_lose_the_loss():
    hidden = torch.tensor([[300.0], [-300.0]])
    weight = torch.tensor([[1.0], [0.0], [-1.0]])
    _, losses, _ = summed_loss(hidden, weight, None, torch.tensor([0, 0]))
    assert losses.tolist() == [0.0, 600.0]


def test_bf16_heads_give_losses_in_fp32_and_gradients_as_near_as_the_hosts():
    head = Head(CHUNK + 20, dtype=torch.bfloat16, bias=True)
    exact = [leaf.detach().double().requires_grad_() for leaf in head.leaves]
    logits = F.linear(*exact)
    wanted_loss = F.cross_entropy(logits, head.targets, reduction="sum")
    host_logits = F.linear(*head.leaves).float()
    host = torch.autograd.grad(
        F.cross_entropy(host_logits, head.targets, reduction="sum"), head.leaves
    )
    total, losses, _ = summed_loss(*head.inputs)
    assert losses.dtype == torch.float32
    assert abs(total.item() - wanted_loss.item()) <= 2**-8 * wanted_loss.item()
    wanted = torch.autograd.grad(wanted_loss, exact)
    found = torch.autograd.grad(total, head.leaves)
    for mine, theirs, want in zip(found, host, wanted, strict=True):
        assert mine.dtype == torch.bfloat16
        error, hosts_error = ((g.double() - want).norm() for g in (mine, theirs))
        assert error <= 1.5 * hosts_error + 2**-9 * want.norm()


def test_the_heads_gradient_is_summed_over_many_chunks_without_rounding():
    chunks = 32
    hidden = torch.ones(chunks * CHUNK, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(chunks * CHUNK, dtype=torch.long)
    total, *_ = summed_loss(hidden, weight, None, targets)
    assert total.dtype == torch.float32
    (found,) = torch.autograd.grad(total, weight)
    # Each target adds 1/2; a sum in bf16 stops growing at 256 halves.
    assert found.flatten().tolist() == [-chunks * CHUNK / 2, chunks * CHUNK / 2]


def test_no_gradient_is_made_where_none_can_be_asked_for():
    head = Head(CHUNK)
    with torch.no_grad(), Largest() as largest:
        summed_loss(*head.inputs)
    assert largest.products == 1


def test_the_heads_gradient_is_let_go_of_in_the_backward_pass():
    head = Head(CHUNK)
    total, *_ = summed_loss(*head.inputs)
    node = total.grad_fn
    assert any(x is not None for x in node.gradients)
    total.backward()
    assert node.gradients is None


def test_a_second_backward_pass_is_refused():
    total, *_ = summed_loss(*Head(5).inputs)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="for more passes use token_losses"):
        total.backward()


class Largest(TorchDispatchMode):
    """The most elements in a tensor that any operation returns, and the matrix products."""

    numel = 0
    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return out


def by_cross_entropy(hidden, weight, bias, targets):
    return F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum")


def in_chunks(hidden, weight, bias, targets):
    return summed_loss(hidden, weight, bias, targets)[0]


def in_checkpointed_chunks(hidden, weight, bias, targets):
    return token_losses(hidden, weight, bias, targets)[0].sum()


def in_chunks_with_entropy(hidden, weight, bias, targets):
    return summed_loss(hidden, weight, bias, targets, with_entropy=True)[0]


@pytest.mark.parametrize(
    ("loss", "rows"),
    [
        (in_chunks, CHUNK),
        (in_chunks_with_entropy, CHUNK),
        (in_checkpointed_chunks, CHUNK),
        (by_cross_entropy, 4 * CHUNK),
    ],
)
def test_the_logits_of_one_chunk_are_the_largest_tensor(loss: Callable, rows: int):
    # The last case shows that the measure sees what it should.
    vocabulary = 40
    hidden = torch.randn(4 * CHUNK, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    targets = torch.randint(vocabulary, (4 * CHUNK,))
    with Largest() as largest:
        loss(hidden, weight, None, targets).backward()
    assert largest.numel == rows * vocabulary


@pytest.mark.parametrize("loss", [in_chunks, in_checkpointed_chunks])
def test_no_logits_are_saved_for_the_backward_pass(loss: Callable):
    saved = []
    hidden = torch.randn(4 * CHUNK, 4, requires_grad=True)
    weight = torch.randn(40, 4, requires_grad=True)
    targets = torch.randint(40, (4 * CHUNK,))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss(hidden, weight, None, targets)
    assert all(x.numel() <= hidden.numel() for x in saved)
