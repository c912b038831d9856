"""What a score or a quota returns is judged before anything follows from it, and named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from regate_ds.algorithm.batch import ELIDABLE
from regate_ds.algorithm.executions.elide import Elide
from regate_ds.algorithm.quotas.per_sample import PerSample
from regate_ds.algorithm.rankings.random import RandomOrder
from regate_ds.algorithm.rows import RowLayout
from regate_ds.algorithm.window import Choice, Method, plan_window, score_window
from tests.support.batches import random_batch

_, BATCH = random_batch([[20], [13]])
NUM_LABELS = int(BATCH.is_label_BT.sum())


@dataclass(frozen=True)
class Gives:
    """A score or a quota that gives whatever a test wants."""

    what: Any
    column = None
    statistics = ()

    def __call__(self, inputs: object) -> Any:
        return self.what


METHOD = Method(
    score=Gives(torch.zeros(NUM_LABELS)),
    quota=PerSample(),
    execution=Elide(),
    keep_share=0.5,
    ranking=RandomOrder(),
    image_share=1.0,
)


def score(what: Any) -> torch.Tensor:
    method = replace(METHOD, score=Gives(what))
    return score_window(method, [BATCH], step=0, reference_N=None, statistics={})


@pytest.mark.parametrize("what", [[1.0] * NUM_LABELS, torch.zeros(2), torch.zeros(NUM_LABELS, 1)])
def test_a_score_of_another_shape_is_refused(what: Any):
    with pytest.raises(
        ValueError, match=rf"^Gives returned .* a tensor of shape \({NUM_LABELS},\)$"
    ):
        score(what)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_cannot_be_ranked_is_refused(value: float):
    values_N = torch.zeros(NUM_LABELS)
    values_N[3] = value
    with pytest.raises(RuntimeError, match=f"the score Gives is {value} at a label position"):
        score(values_N)


def test_whole_numbers_are_scores():
    assert score(torch.arange(NUM_LABELS)).dtype == torch.float64


def elidable() -> list[int]:
    is_elidable_BT = BATCH.kind_BT == ELIDABLE
    return is_elidable_BT.sum(1).tolist()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.tensor([1]), r"Gives returned \(1,\)"),
        (torch.tensor([1.0, 2.0]), "the quota Gives keeps"),
        (torch.tensor([-1, 2]), "the quota Gives keeps"),
        (torch.tensor(elidable()) + 1, "count must return whole numbers between 0 and these"),
    ],
)
def test_counts_that_no_sample_has_are_refused(counts: torch.Tensor, message: str):
    method = replace(METHOD, quota=Gives(None))
    choice = Choice(values_N=torch.zeros(NUM_LABELS).double(), num_hard_S=counts)
    with pytest.raises(ValueError, match=message):
        plan_window(method, [BATCH], choice, RowLayout())
