"""A round runs what is missing and nothing else; a failed run is named and the others go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from regate_ds.recipe.learning.cost_job import take_turns
from tests.recipe.learning.round_helper import check_round
from tests.support.ranks import run_ranks


def test_a_round_runs_what_is_missing_and_nothing_else(tmp_path: Path):
    run_ranks(check_round, 1, str(tmp_path), timeout=900)


def test_runs_take_turns_to_their_ends_and_the_first_steps_warm_up():
    order: list[str] = []

    def steps(name: str, kinds: list[tuple[bool, float]]) -> Iterator[tuple[bool, float]]:
        for number, kind in enumerate(kinds):
            order.append(f"{name}{number}")
            yield kind

    runs = {
        "a": steps("a", [(True, 9.0), (False, 1.0), (False, 3.0), (False, 2.0)]),
        "b": steps("b", [(True, 9.0), (True, 5.0)]),
    }
    found = take_turns(runs)
    assert order == ["a0", "b0", "a1", "b1", "a2", "a3"]
    assert found == {
        "a": {"dense": None, "sparse": 2.0, "num_timed": [0, 3]},
        "b": {"dense": 5.0, "sparse": None, "num_timed": [1, 0]},
    }
