"""Which words sparse steps keep, against those that need the image.

A word is kept if all of its label positions are: they lie in the plan's kept set and have a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from regate_ds.algorithm.batch import TokenBatch
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.data.llava.records import Record
from regate_ds.data.llava.sample import EncodedSample
from regate_ds.recipe.evaluation.words import counted_words, ratio

LabelledWord = tuple[bool, list[int]]
"""Whether a word needs the image, and the numbers of its label positions in its sample."""


@dataclass
class WordsKept:
    """Counts over the sparse steps of a run."""

    num_kept: int = 0
    num_gold: int = 0
    """Words that need the image."""

    num_gold_kept: int = 0

    def add(
        self, words: Sequence[Sequence[LabelledWord]], batch: TokenBatch, plan: ElisionPlan
    ) -> None:
        """Count the words of a micro-batch's samples, given in the batch's order.

        Nothing is counted where the forward pass chooses, where each layer has a kept set of its
        own, and where weights stand for a choice.
        """
        if plan.num_chosen is not None or plan.sets or plan.weight_L is not None:
            return
        is_kept_P = torch.zeros(batch.labels_BT.numel(), dtype=torch.bool)
        is_kept_P[plan.position_R] = True
        is_target_P = torch.zeros_like(is_kept_P)
        is_target_P[plan.label_position_L] = True
        chosen_N = (is_kept_P & is_target_P)[batch.is_label_BT.reshape(-1)]
        for of_sample, chosen in zip(
            words, chosen_N.split(batch.num_labels_per_sample), strict=True
        ):
            for is_gold, labels in of_sample:
                is_kept = bool(chosen[labels].all())
                self.num_kept += is_kept
                self.num_gold += is_gold
                self.num_gold_kept += is_gold and is_kept

    @property
    def precision(self) -> float | None:
        return ratio(self.num_gold_kept, self.num_kept)

    @property
    def recall(self) -> float | None:
        return ratio(self.num_gold_kept, self.num_gold)


def labelled_words(record: Record, sample: EncodedSample) -> list[LabelledWord]:
    """Return the words of a sample's answers that are judged."""
    return [
        (word.is_visual, labels)
        for number, turn in enumerate(record.turns)
        for word, labels in counted_words(turn, number, sample)
    ]
