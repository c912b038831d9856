"""Words kept by sparse steps, against a walk over words one by one."""

from __future__ import annotations

from dataclasses import replace

import torch

from regate_ds.algorithm.batch import IGNORE, TokenBatch
from regate_ds.algorithm.plan import plan_loss, plan_rows
from regate_ds.recipe.learning.words_kept import WordsKept

# Two rows of 7 positions; labels at 2 to 5 of the first, 1 to 3 of the second.
LABELS = torch.tensor(
    [
        [IGNORE, IGNORE, 11, 12, 13, 14, IGNORE],
        [IGNORE, 21, 22, 23, IGNORE, IGNORE, IGNORE],
    ]
)
SEGMENTS = torch.tensor([[0] * 7, [0] * 5 + [-1] * 2])
BATCH = TokenBatch((((("a", 0)),), ((("a", 1)),)), SEGMENTS, LABELS)

WORDS = [
    # A word of two tokens that needs the image, and two of one.
    [(True, [0, 1]), (False, [2]), (True, [3])],
    [(False, [0]), (True, [1, 2])],
]


def test_a_word_is_kept_if_all_of_its_tokens_are():
    # Labels 0, 1 and 2 of the first row, 0 and 2 of the second; 7 is padding.
    kept_BK = torch.tensor([[0, 1, 2, 3, 4, 6], [0, 1, 3, 4, 7, 7]])
    found = WordsKept()
    found.add(WORDS, BATCH, plan_rows(BATCH, kept_BK))
    assert (found.num_kept, found.num_gold, found.num_gold_kept) == (3, 3, 1)
    assert found.precision == 1 / 3
    assert found.recall == 1 / 3


def test_where_all_is_computed_words_with_a_loss_are_kept():
    target_BT = torch.zeros_like(LABELS, dtype=torch.bool)
    target_BT[0, 5] = True
    target_BT[1, 1:4] = True
    found = WordsKept()
    found.add(WORDS, BATCH, plan_loss(BATCH, target_BT))
    found.add(WORDS, BATCH, plan_loss(BATCH, target_BT))
    assert (found.num_kept, found.num_gold, found.num_gold_kept) == (6, 6, 4)


def test_weights_and_sets_of_layers_are_no_choice_of_words():
    found, plan = WordsKept(), plan_loss(BATCH, BATCH.is_label_BT)
    for other in (
        replace(plan, weight_L=torch.ones(plan.num_targets)),
        replace(plan, sets=(plan,)),
    ):
        found.add(WORDS, BATCH, other)
    assert found.precision is None


def test_a_run_without_sparse_steps_has_no_share():
    assert WordsKept().precision is None
    assert WordsKept().recall is None
