"""What a host asks of an attachment beyond plans and losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _nothing(forward: Any) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """The adapter of a trainer has them; a loop of the user's own has none."""

    observes: bool = False
    """Outputs tell the entropy at each kept target, and whether the target is the likeliest token.
    """

    may_displace: Callable[[Any], bool] = _nothing
    """Whether a method that stands on the model's instance already is the host's own, which may be
    displaced: ``remove`` puts it back. Calls with a plan pass by one that is the model's forward,
    and go through the others."""


NO_WISHES = Wishes()
