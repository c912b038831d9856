"""Sharing a teacher's losses out over the student's tokens, against cells of single characters."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch

from regate_ds.teacher.tokenizers.alignment import CharRange, align, align_text, edges
from tests.teacher.two_tokenizers_helper import any_text, by_bytes, by_pieces

CELLS = 60
"""Parts of a character: any number of tokens up to six shares it evenly."""


def cells_of(spans: list[CharRange], num_chars: int) -> list[set[int]]:
    """The cells that each token stands for, character by character."""
    owned: list[set[int]] = [set() for _ in spans]
    for char in range(num_chars):
        tokens = [n for n, (start, end) in enumerate(spans) if start <= char < end]
        # What no token spells belongs to the next that spells something after it, or to the last.
        later = [n for n, (start, _) in enumerate(spans) if start > char or start == char + 1]
        tokens = tokens or later[:1] or [len(spans) - 1]
        for place, token in enumerate(tokens):
            part = CELLS // len(tokens)
            owned[token] |= set(
                range(char * CELLS + place * part, char * CELLS + (place + 1) * part)
            )
    return owned


def plain_shares(student: list[CharRange], teacher: list[CharRange], num_chars: int) -> dict:
    """Each cell of a teacher's token gives its part of the token to whose cell it is."""
    found: dict[tuple[int, int], Fraction] = {}
    mine = cells_of(student, num_chars)
    for j, cells in enumerate(cells_of(teacher, num_chars)):
        for i, own in enumerate(mine):
            if both := len(cells & own):
                found[i, j] = Fraction(both, len(cells))
    return found


def spans_of(tokenizer, text: str) -> list[CharRange]:
    options = {"add_special_tokens": False, "return_offsets_mapping": True}
    return [tuple(span) for span in tokenizer(text, **options)["offset_mapping"]]


def test_shares_are_those_of_single_characters_cells():
    one, other, rng = by_bytes(), by_pieces(), random.Random(0)
    num_straddling = 0
    for _ in range(300):
        text = any_text(rng).strip()
        mine, theirs = spans_of(one, text), spans_of(other, text)
        if not mine or not theirs:
            continue
        found = align_text(edges(mine, len(text)), edges(theirs, len(text)))
        found = {(i, j): share for i, j, share in found if share > 1e-9}
        expected = plain_shares(mine, theirs, len(text))
        wide = {(i, j): share for (i, j), share in found.items() if cells_of(theirs, len(text))[j]}
        assert wide.keys() == expected.keys(), text
        for pair, share in expected.items():
            assert found[pair] == pytest.approx(float(share), abs=1e-12)
        num_straddling += sum(share != 1 for share in expected.values())
    assert num_straddling > 300


def test_a_split_token_is_shared_by_length():
    # "number|s" against "num|bers"
    assert list(align_text([0, 6, 7], [0, 3, 7])) == [(0, 0, 1.0), (0, 1, 0.75), (1, 1, 0.25)]


def test_the_space_before_a_word_belongs_to_the_word():
    # "is red": the offsets leave the space out, or do not.
    assert edges([(0, 2), (3, 6)], 6) == edges([(0, 2), (2, 6)], 6) == [0, 2, 6]


def test_tokens_of_one_character_share_it_evenly():
    # A space and a character of two tokens.
    assert edges([(0, 2), (1, 2)], 2) == [0, 1.5, 2]


def test_a_token_without_width_goes_where_it_stands():
    assert list(align_text([0, 2, 4], [0, 2, 2, 4])) == [(0, 0, 1.0), (1, 1, 1.0), (1, 2, 1.0)]
    assert list(align_text([0, 2, 4], [0, 4, 4])) == [(0, 0, 0.5), (1, 0, 0.5), (1, 1, 1.0)]


def test_where_both_cut_alike_tokens_correspond_one_to_one():
    cut = [0.0, 1.0, 1.0, 1.25, 2.0]
    assert list(align_text(cut, cut)) == [(n, n, 1.0) for n in range(4)]


def test_an_eos_answers_for_the_others_eos_and_for_text_that_is_nothing_to_the_student():
    found = align([(0, 2, 2)], [(0, 0, 1), (0, 1, 2), (0, 2, 2)], num_student=1)
    assert found.share_out(torch.tensor([1.0, 2.0, 4.0])).tolist() == [7.0]
    found = align([(0, 0, 2), (0, 2, 2)], [(0, 2, 2)], num_student=2)
    assert found.share_out(torch.tensor([3.0])).tolist() == [0.0, 3.0]


def test_turns_are_aligned_each_for_itself():
    mine = [(0, 0, 2), (0, 2, 2), (1, 0, 1), (1, 1, 1)]
    theirs = [(0, 0, 1), (0, 1, 2), (0, 2, 2), (1, 0, 1), (1, 1, 1)]
    found = align(mine, theirs, num_student=4)
    assert found.share_out(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])).tolist() == [3, 4, 8, 16]


def test_of_a_cut_sample_only_what_its_labels_cover_is_asked_for():
    mine = [(0, 0, 3), (0, 3, 6), (0, 6, 6)]
    theirs = [(0, 0, 2), (0, 2, 4), (0, 4, 6), (0, 6, 6)]
    found = align(mine, theirs, num_student=1)
    assert found.num_teacher == 2
    assert found.share_out(torch.tensor([1.0, 4.0])).tolist() == [3.0]
