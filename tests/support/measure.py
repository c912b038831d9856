"""How far the gradients of two runs are apart: per tensor, and as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor, nn

Gradients = dict[str, Tensor]


def gradients(model: nn.Module) -> Gradients:
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def errors(found: Gradients, expected: Gradients) -> Iterable[tuple[str, float, float]]:
    """(name, ||g - g*||, ||g*||) per tensor; the two must name the same tensors."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, wanted in expected.items():
        difference = (found[name].double() - wanted.double()).norm()
        yield name, float(difference), float(wanted.double().norm())


def assert_gradients_equal(found: Gradients, expected: Gradients, tolerance: float) -> None:
    """Per tensor ||g - g*|| <= tolerance * ||g*|| + 1e-7 * ||all g*||.

    The second term is for tensors whose gradient is 0 in theory, such as a key bias.
    """
    rows = list(errors(found, expected))
    floor = 1e-7 * math.sqrt(sum(size**2 for _, _, size in rows))
    bad = [
        f"{name}: {error:.2e} > {tolerance:g} * {size:.2e} + {floor:.1e}"
        for name, error, size in rows
        if not error <= tolerance * size + floor
    ]
    assert not bad, "\n".join(bad)


def relative_error(found: Gradients, expected: Gradients) -> float:
    """||all g - all g*|| / ||all g*||: one number for a whole run."""
    rows = list(errors(found, expected))
    error = math.sqrt(sum(error**2 for _, error, _ in rows))
    return error / math.sqrt(sum(size**2 for _, _, size in rows))
