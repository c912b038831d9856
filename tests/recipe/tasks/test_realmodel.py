"""When a word that needs the image counts as found; the command itself is `make realmodel`."""

from pathlib import Path

import torch

from regate_ds.data.llava.records import Record, Turn
from regate_ds.data.llava.sample import EncodedSample
from regate_ds.recipe.tasks.digits.realmodel import words_in_upper_half


def test_a_word_is_found_by_its_hardest_token():
    turn = Turn("?", "a seven b red.", ((2, 7), (10, 13)))
    record = Record(("set", 0), None, (), (), (turn,), Path("data.json"))
    spans = ((0, 0, 1), (0, 2, 5), (0, 5, 7), (0, 8, 9), (0, 10, 13), (0, 13, 14), (0, 14, 14))
    empty = torch.empty(0)
    sample = EncodedSample(("set", 0), empty, empty, empty, spans, ())
    losses_N = torch.tensor([0.5, 0.0, 3.0, 2.0, 0.4, 1.0, 0.1])
    # The upper half are four of seven: 3.0, 2.0, 1.0 and 0.5.
    assert list(words_in_upper_half(record, sample, losses_N)) == [True, False]
