"""The shapes set: true answers, held-out pairs, and gold words that nothing but the image tells."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from regate_ds.data.llava.read import read_records
from regate_ds.recipe.tasks.pretraining.tokenizer import train_tokenizer
from regate_ds.recipe.tasks.shapes import scenes as s
from regate_ds.recipe.tasks.shapes.lessons import shapes_lessons
from regate_ds.recipe.tasks.shapes.questions import ask
from regate_ds.recipe.tasks.shapes.words import (
    COLUMNS,
    COMPARED,
    COUNT_WORDS,
    FILLS,
    ROWS,
    SHAPES,
    Shown,
    plural,
)

KINDS = (SHAPES, tuple(s.COLOURS), FILLS, tuple(s.SIZES), ROWS, COLUMNS)
PLURALS = {plural(shape): shape for shape in SHAPES}
SEEN_WORDS = {word for kind in (*KINDS, COUNT_WORDS, COMPARED) for word in kind}
RELATIONS = ("left of", "right of", "above", "below")

Exchange = tuple[list[Shown], str, str, list[str]]
"""The scene, the question, the answer and its gold words."""


def exchanges(number: int, seed: int = 0) -> list[Exchange]:
    found: list[Exchange] = []
    for i in range(number):
        rng = Random(f"{seed} {i}")
        scene = [placed.shown for placed in s.draw_scene("train", rng)]
        for question, answer in ask(scene, rng):
            gold = [answer.text[a:b] for a, b in answer.gold_spans]
            found.append((scene, question, answer.text, gold))
    return found


@pytest.fixture(scope="module")
def asked() -> list[Exchange]:
    return exchanges(4000)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def told(scene: list[Shown], name: str) -> Shown:
    """The one shape of a name, as in "red circle", "circle" and "red shape"."""
    own = set(name.split()) - {"shape"}
    [shown] = [each for each in scene if own <= set(each)]
    return shown


def by_question(asked: list[Exchange], pattern: str) -> list[tuple[Exchange, tuple[str, ...]]]:
    matches = [(each, re.fullmatch(pattern, each[1])) for each in asked]
    found = [(each, match.groups()) for each, match in matches if match]
    assert len(found) > 50, pattern
    return found


def test_the_same_seed_writes_the_same_bytes_and_a_larger_set_begins_with_the_smaller(
    tmp_path: Path,
):
    for name, number, seed in (("a", 3, 1), ("b", 5, 1), ("c", 3, 2)):
        s.build_shapes(tmp_path / name, num_train=number, num_test=2, seed=seed)
    small, large, other = (json.loads((tmp_path / n / "train.json").read_text()) for n in "abc")
    assert large[:3] == small
    assert other != small
    for image in (tmp_path / "a" / "images").iterdir():
        assert (tmp_path / "b" / "images" / image.name).read_bytes() == image.read_bytes()


def test_the_reader_takes_every_record_and_the_words_of_its_gold_spans(tmp_path: Path):
    s.build_shapes(tmp_path, num_train=30, num_test=5, seed=0)
    records, bad = read_records(tmp_path / "train.json", name="shapes")
    assert len(records) == 30
    assert not bad
    for turn in (turn for record in records for turn in record.turns):
        assert turn.gold_spans
        assert {turn.answer[a:b] for a, b in turn.gold_spans} <= SEEN_WORDS


def test_an_empty_part_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="the test part needs at least 1 sample, got 0"):
        s.build_shapes(tmp_path, num_train=1, num_test=0, seed=0)
    assert not any(tmp_path.iterdir())


def test_held_out_pairs_are_in_the_test_part_alone():
    lessons, rng = shapes_lessons(), Random(0)
    pictures = {
        "train": [s.draw_scene("train", rng) for _ in range(300)],
        "test": [s.draw_scene("test", rng) for _ in range(300)],
        "full": [list(lessons.full(rng).values()) for _ in range(100)],
        "crowded": [list(lessons.crowded(rng).values()) for _ in range(100)],
    }
    shown = {
        name: Counter(placed.shown[:2] for scene in scenes for placed in scene)
        for name, scenes in pictures.items()
    }
    assert len(s.HELD_OUT) == 6
    assert all(shown["test"][pair] > 10 for pair in s.HELD_OUT)
    for name in ("train", "full", "crowded"):
        assert len(shown[name]) == 30
        assert not shown[name].keys() & set(s.HELD_OUT)


def test_no_two_shapes_of_a_picture_have_the_same_name_or_place():
    for seed in range(200):
        scene = [placed.shown for placed in s.draw_scene("train", Random(seed))]
        assert s.FEWEST <= len(scene) <= s.MOST
        assert len({shown.name for shown in scene}) == len(scene)
        cells = [shown.cell for shown in scene]
        assert sorted(set(cells)) == cells


def test_what_is_told_of_a_named_shape_is_true(asked: list[Exchange]):
    for (scene, _, answer, gold), (name,) in by_question(
        asked, r"(?:Where is|Describe) the (\w+|\w+ \w+)[?.]"
    ):
        shown = told(scene, name)
        assert set(gold) <= set(shown[2:])
        assert len(gold) == (3 if "column, and it is" in answer else 4)


def test_what_is_told_of_a_place_is_what_stands_there(asked: list[Exchange]):
    for (scene, _, _, gold), place in by_question(
        asked, r"What is in the (\w+) row and in the (\w+) column\?"
    ) + by_question(asked, r"Describe the shape at the place (\w+) (\w+)\."):
        [shown] = [each for each in scene if each[4:] == place]
        assert set(gold) in (set(shown[:3]), set(shown[:4]))


def test_the_shape_beside_another_is_the_next_one_in_that_direction(asked: list[Exchange]):
    steps = dict(zip(RELATIONS, ((0, -1), (0, 1), (-1, 0), (1, 0))))
    for relation in RELATIONS:
        pattern = rf"(?:What|Describe the shape that) is just {relation} the (\w+|\w+ \w+)[?.]"
        for (scene, _, _, gold), (name,) in by_question(asked, pattern):
            row, column = told(scene, name).cell
            down, right = steps[relation]
            [beside] = [each for each in scene if each.cell == (row + down, column + right)]
            assert set(gold) in (set(beside[:3]), set(beside[:4]))


def test_the_larger_of_two_is_told(asked: list[Exchange]):
    for (scene, _, _, gold), names in by_question(
        asked, r"Which is larger, the (\w+ \w+) or the (\w+ \w+)\?"
    ):
        [large] = [each for each in (told(scene, n) for n in names) if each.size == "large"]
        assert gold == [large.shape, large.fill, large.row]


def test_numbers_are_those_of_the_picture(asked: list[Exchange]):
    for (scene, _, _, gold), kinds in by_question(
        asked, r"How many (\w+) are there, and how many shapes are (\w+)\?"
    ) + by_question(asked, r"How many shapes are (\w+), and how many are (\w+)\?"):
        numbers = [sum(PLURALS.get(kind, kind) in shown for shown in scene) for kind in kinds]
        assert gold == [COUNT_WORDS[number] for number in numbers]
    for (scene, _, _, gold), _ in by_question(asked, r"How many shapes are there\?"):
        assert gold == [COUNT_WORDS[len(scene)]]


def test_two_numbers_are_compared(asked: list[Exchange]):
    outcomes: Counter[str] = Counter()
    for (scene, _, _, gold), names in by_question(asked, r"Are there more (\w+) than (\w+)\?"):
        first, second = (sum(PLURALS[n] == shown.shape for shown in scene) for n in names)
        is_true = {"smaller": first < second, "equal": first == second, "greater": first > second}
        assert is_true[gold[0]]
        outcomes.update(gold)
    assert all(outcomes[word] > 0.2 * outcomes.total() for word in COMPARED)


def test_the_most_frequent_word_is_the_only_one_so_frequent(asked: list[Exchange]):
    for (scene, question, _, gold), _ in by_question(
        asked, r"Which (?:colour|kind of shape) is seen most often\?"
    ):
        count = Counter(each.colour if "colour" in question else each.shape for each in scene)
        best = max(count.values())
        assert [word for word, number in count.items() if number == best] == gold[:1]
        assert gold[1] == COUNT_WORDS[best]


def test_the_shape_that_is_alone_is_the_only_one_of_its_row(asked: list[Exchange]):
    for (scene, _, _, gold), _ in by_question(asked, r"Which shape is alone in its row\?"):
        [alone] = [a for a in scene if sum(b.row == a.row for b in scene) == 1]
        assert gold == [alone.row, alone.shape, alone.fill, alone.colour]


def test_a_row_is_read_from_the_left(asked: list[Exchange]):
    for (scene, _, _, gold), (row,) in by_question(asked, r"Read the (\w+) row from left .*"):
        read = sorted((each for each in scene if each.row == row), key=lambda each: each.cell)
        wanted = [word for each in read for word in (each.fill, each.colour, each.shape)]
        assert gold == [COUNT_WORDS[len(read)], *wanted]


def skeleton(text: str) -> str:
    """A text whose words of the picture are left open."""
    text = re.sub("|".join(RELATIONS), "_", text)
    return re.sub(r"\w+", lambda m: "_" if PLURALS.get(m[0], m[0]) in SEEN_WORDS else m[0], text)


def test_a_question_fixes_every_word_of_its_answer_but_the_seen_ones(asked: list[Exchange]):
    answers = defaultdict(set)
    for _, question, answer, gold in asked:
        length = gold[0] if question.startswith("Read") else ""
        answers[skeleton(question), length].add(skeleton(answer))
    assert {len(found) for found in answers.values()} == {1}


def test_gold_words_are_all_seen_words_that_the_question_does_not_name(asked: list[Exchange]):
    for _, question, answer, gold in asked:
        rest = Counter(word for word in words(answer) if PLURALS.get(word, word) in SEEN_WORDS)
        assert Counter(gold) <= rest
        assert (rest - Counter(gold)).keys() <= set(words(question))


def test_no_gold_word_is_nearly_known_from_the_words_before_it():
    """Who knows how often each word stands at a place after another one is still often wrong."""
    seen: dict[tuple[Any, ...], Counter[str]] = defaultdict(Counter)
    for _, question, _, gold in exchanges(6000, seed=5):
        asked = skeleton(question)
        for place, word in enumerate(gold):
            for before in {*gold[:place], *words(question)} & SEEN_WORDS | {""}:
                seen[asked, place, before][word] += 1
    shares = [max(count.values()) / count.total() for count in seen.values() if count.total() > 60]
    assert len(shares) > 300
    assert max(shares) < 0.75


def test_every_shape_is_drawn_in_its_cell_with_its_colour_and_size():
    rng = Random(0)
    for _ in range(30):
        scene = s.draw_scene("test", rng)
        is_inked = (np.asarray(s.render(scene)) != s.PAPER).any(-1)
        by_cell = is_inked.reshape(len(ROWS), s.CELL_HIGH, len(COLUMNS), s.CELL_WIDE)
        is_used = by_cell.any(axis=(1, 3))
        assert sorted(map(tuple, np.argwhere(is_used).tolist())) == [p.shown.cell for p in scene]
        for placed in scene:
            (row, column), shown = placed.shown.cell, placed.shown
            corner = np.array([row * s.CELL_HIGH, column * s.CELL_WIDE])
            inked = np.argwhere(by_cell[row, :, column]) + corner
            high, wide = np.ptp(inked, axis=0) + 1
            assert max(high, wide) <= s.SIZES[shown.size]
            pixels = np.asarray(s.render(scene)).astype(int)[tuple(inked.T)]
            colours = np.array(list(s.COLOURS.values()))
            exact = (pixels[:, None] == colours).all(-1).sum(0)
            assert list(s.COLOURS)[exact.argmax()] == shown.colour


def test_all_pictures_of_a_shape_differ_from_those_of_the_others():
    def ink(shape: str, fill: str, size: str) -> bytes:
        shown = Shown(shape, "black", fill, size, "top", "first")
        return s.render([s.Placed(shown, 0, 0, 0.0)]).tobytes()

    drawn = [ink(a, b, c) for a in SHAPES for b in FILLS for c in s.SIZES]
    assert len(set(drawn)) == len(drawn)


def test_notes_tell_the_rest_of_what_they_name_or_what_stands_beside_it():
    rng, lessons = Random(0), shapes_lessons()
    kinds: Counter[str] = Counter()
    for _ in range(60):
        cells = lessons.crowded(rng)
        shown = [placed.shown for placed in cells.values()]
        notes = lessons.notes(cells, rng)
        ends = [-1, *(i for i, (word, _) in enumerate(notes) if word == ".")]
        for start, end in pairwise(ends):
            note = notes[start + 1 : end]
            given = [word.strip() for word, is_seen in note if not is_seen]
            seen = [word.strip() for word, is_seen in note if is_seen]
            if given[0] in ROWS:
                assert [*seen, *given] in [list(each) for each in shown]
                kinds["place"] += 1
            elif not given[0].startswith(("left", "right", "above", "below")):
                [each] = [each for each in shown if set(given) <= set(each)]
                assert seen == [word for word in each if word not in given]
                kinds[f"{len(given)} words"] += 1
            else:
                each, relation = told(shown, " ".join(given[-2:])), " ".join(given[:-2])
                down, right = dict(zip(RELATIONS, ((0, -1), (0, 1), (-1, 0), (1, 0))))[relation]
                row, column = each.cell
                [beside] = [b for b in shown if b.cell == (row + down, column + right)]
                assert seen == list(beside[:4])
                kinds["beside"] += 1
    assert all(kinds[kind] > 20 for kind in ("place", "1 words", "2 words", "beside"))


def test_every_gold_word_is_one_token_of_the_students_tokenizer():
    texts = [text for _, question, answer, _ in exchanges(800) for text in (question, answer)]
    tokenizer = train_tokenizer(texts, vocab_size=512)
    for word in SEEN_WORDS - {"six"}:
        assert len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1, word
