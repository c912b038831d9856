"""What a Trainer logs of the method, beside the loss: means over the steps since its last log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from regate_ds.adapters.figures import shares_of

PREFIX = "regate/"
"""Begins every name, so that trackers show them together."""

_KEPT = ("tokens_kept", "answer_kept", "image_kept")
_SECONDS = ("step_seconds", "teacher_seconds")


class SinceLog:
    """Sums over the steps that ended since the last log."""

    def __init__(self) -> None:
        self._once: dict[str, float] = {}
        self._forget()

    def add(self, values: Mapping[str, Any]) -> None:
        """Add a step's counts and seconds, by name."""
        numbers = {name: x for name, x in values.items() if not isinstance(x, bool)}
        self._sums.update(numbers)
        self._num_steps += 1

    def add_once(self, name: str, value: float) -> None:
        """Add what the next log alone has."""
        self._once[name] = value

    def take(self) -> dict[str, float]:
        """Return the figures, and forget them; empty if no step ended.

        kept_share, answer_kept_share and image_kept_share are of all these steps together, the
        others means of a step.
        """
        if not self._num_steps:
            return {}
        sums = dict(self._sums)
        means = {n: sums[n] / self._num_steps for n in (*_KEPT, *_SECONDS) if n in sums}
        found = {**shares_of(sums), **means, **self._once}
        self._forget()
        self._once = {}
        return {f"{PREFIX}{name}": value for name, value in found.items()}

    def _forget(self) -> None:
        self._sums: Counter[str] = Counter()
        self._num_steps = 0
