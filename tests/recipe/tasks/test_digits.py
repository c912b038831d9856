"""The digits set: real digits, held out; answers that tell the scene; gold words worth the name."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from regate_ds.data.llava.read import read_records
from regate_ds.recipe.tasks.answers import Answer, fill
from regate_ds.recipe.tasks.digits.questions import COLUMNS, COUNT_WORDS, DIGITS, ROWS
from regate_ds.recipe.tasks.digits.scenes import (
    BACKGROUND,
    CELL,
    COLOURS,
    SIZES,
    Split,
    build_digits,
    draw_scene,
    handwritten,
    render,
)

WORDS = {
    "digit": DIGITS,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "row": ROWS,
    "column": COLUMNS,
}
PROPERTY = {word: name for name, words in WORDS.items() for word in words}
SEEN_WORDS = {*PROPERTY, *COUNT_WORDS}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pictures")
    build_digits(out, num_train=600, num_test=60, seed=3)
    return out


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clips")
    build_digits(out, num_train=150, num_test=10, seed=3, num_frames=3)
    return out


def load(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())


def exchanges(records: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str, dict[str, Any]]]:
    """(record, question, the answer's turn) for all turns of all records."""
    return [
        (record, said["value"], answer)
        for record in records
        for said, answer in zip(record["conversations"][::2], record["conversations"][1::2])
    ]


def gold_words(answer: dict[str, Any]) -> list[str]:
    return [answer["value"][start:end] for start, end in answer["gold_spans"]]


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def both(pictures: Path, clips: Path) -> list[tuple[dict[str, Any], str, dict[str, Any]]]:
    return exchanges(load(pictures / "train.json") + load(clips / "train.json"))


@pytest.mark.parametrize("num_frames", [None, 2])
def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(
    tmp_path: Path, num_frames: int | None
):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_digits(tmp_path / name, num_train=4, num_test=2, seed=seed, num_frames=num_frames)
    first, again, other = (all_bytes(tmp_path / name) for name in "abc")
    assert first == again
    assert set(first) == set(other)
    assert all(first[name] != other[name] for name in ("train.json", "test.json"))


def test_a_larger_set_begins_with_the_smaller_one(tmp_path: Path):
    build_digits(tmp_path / "small", num_train=3, num_test=1, seed=1)
    build_digits(tmp_path / "large", num_train=6, num_test=2, seed=1)
    small, large = (load(tmp_path / name / "train.json") for name in ("small", "large"))
    assert large[:3] == small
    images = all_bytes(tmp_path / "small" / "images")
    assert images.items() <= all_bytes(tmp_path / "large" / "images").items()


def test_training_and_test_digits_are_disjoint_and_together_all_there_are():
    train, test = (
        {image.tobytes() for images in handwritten(part).values() for image in images}
        for part in ("train", "test")
    )
    assert not train & test
    counts = [[len(handwritten(part)[digit]) for digit in range(10)] for part in ("train", "test")]
    assert counts == [[400] * 10, [100] * 10]


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_reader_takes_every_record_of_a_picture_set(pictures: Path, part: str):
    records, bad = read_records(pictures / f"{part}.json", name=part)
    assert not bad
    assert {record.images_per_marker for record in records} == {(1,)}
    assert all(turn.gold_spans for record in records for turn in record.turns)
    with Image.open(records[0].images[0]) as image:
        assert image.size == (3 * CELL, 3 * CELL)


def test_the_reader_takes_every_record_of_a_clip_set(clips: Path):
    records, bad = read_records(clips / "train.json", name="train")
    assert not bad
    assert {record.images_per_marker for record in records} == {(3,)}


def test_there_are_several_questions_on_many_scenes(pictures: Path):
    turns = Counter(len(record["conversations"]) // 2 for record in load(pictures / "train.json"))
    assert set(turns) == {1, 2, 3}
    assert all(number > 30 for number in turns.values())


def test_scenes_have_two_to_four_different_digits_in_different_cells(pictures: Path):
    scenes = [record["scene"] for record in load(pictures / "train.json")]
    assert {len(scene) for scene in scenes} == {2, 3, 4}
    for scene in scenes:
        assert len({shown["digit"] for shown in scene}) == len(scene)
        cells = [(ROWS.index(shown["row"]), COLUMNS.index(shown["column"])) for shown in scene]
        assert sorted(set(cells)) == cells


def statements(answer: str) -> list[str]:
    """The parts of an answer that are about one digit each."""
    parts = re.split(r"(?<=\.) (?=The (?:number|first|second|third|fourth))", answer)
    return [part for part in parts if " digits " not in f"{part} " and "digits." not in part]


def test_every_statement_is_true_of_the_digit_it_names(pictures: Path, clips: Path):
    num_told = Counter()
    for record, _, answer in both(pictures, clips):
        for statement in statements(answer["value"]):
            words = [word for word in re.findall(r"\w+", statement) if word in PROPERTY]
            told = {PROPERTY[word]: word for word in words}
            assert len(told) == len(words)
            [shown] = [shown for shown in record["scene"] if shown["digit"] == told["digit"]]
            assert told.items() <= shown.items()
            num_told.update(list(told))
    assert all(num_told[name] > 100 for name in WORDS)


def test_descriptions_follow_the_order_of_the_scene(pictures: Path, clips: Path):
    num_seen = 0
    for record, _, answer in both(pictures, clips):
        if " first " in answer["value"]:
            words = [word for word in gold_words(answer)[1:] if word in DIGITS]
            assert words == [shown["digit"] for shown in record["scene"]]
            num_seen += 1
    assert num_seen > 50


@pytest.mark.parametrize("name", ["digit", "colour", "size"])
def test_the_order_of_a_description_shows_none_of_the_told_properties(pictures: Path, name: str):
    ranks = [
        [WORDS[name].index(shown[name]) for shown in record["scene"]]
        for record in load(pictures / "train.json")
    ]
    steps = [after - before for scene in ranks for before, after in zip(scene, scene[1:])]
    num_up, num_down = sum(step > 0 for step in steps), sum(step < 0 for step in steps)
    # 600 scenes have about 1,200 steps: five standard errors of a fair coin are 0.08 or less.
    assert abs(num_up / (num_up + num_down) - 0.5) < 0.1


def test_counts_are_those_of_the_scene(pictures: Path):
    num_seen = 0
    for record, question, answer in exchanges(load(pictures / "train.json")):
        if "How many" in question:
            num_large = sum(shown["size"] == "large" for shown in record["scene"])
            expected = [COUNT_WORDS[len(record["scene"])], COUNT_WORDS[num_large]]
            assert gold_words(answer) == expected[: 1 + ("large" in question)]
            num_seen += 1
    assert num_seen > 50


def test_a_question_by_colour_singles_one_digit_out(pictures: Path):
    num_seen = 0
    for record, question, _ in exchanges(load(pictures / "train.json")):
        for colour in set(re.findall(r"\w+", question)) & set(COLOURS):
            assert [shown["colour"] for shown in record["scene"]].count(colour) == 1
            num_seen += 1
    assert num_seen > 20


def test_gold_words_are_all_seen_words_that_the_question_does_not_name(pictures: Path, clips: Path):
    for _, question, answer in both(pictures, clips):
        asked = re.findall(r"\w+", question)
        told = [word for word in re.findall(r"\w+", answer["value"]) if word in SEEN_WORDS]
        assert gold_words(answer) == [word for word in told if word not in asked]


def test_turns_of_one_record_speak_of_different_digits(pictures: Path):
    for record in load(pictures / "train.json"):
        named = [
            word
            for _, question, answer in exchanges([record])
            if "How many" not in question
            for statement in statements(answer["value"])
            for word in re.findall(r"\w+", statement)
            if word in DIGITS
        ]
        assert len(named) == len(set(named))


def skeleton(text: str) -> str:
    return re.sub(r"\w+", lambda match: "_" if match.group() in SEEN_WORDS else match.group(), text)


def test_a_question_fixes_every_word_of_its_answer_but_the_seen_ones(pictures: Path):
    answers = defaultdict(set)
    for _, question, answer in exchanges(load(pictures / "train.json")):
        asked = skeleton(question.removeprefix("<image>\n"))
        num_told = sum(word in COUNT_WORDS for word in gold_words(answer)[:1])
        length = gold_words(answer)[0] if num_told and "digits" in answer["value"] else ""
        answers[asked, length].add(skeleton(answer["value"]))
    assert {len(found) for found in answers.values()} == {1}


def test_gold_words_are_at_most_a_third_of_an_answer(pictures: Path, clips: Path):
    for _, _, answer in both(pictures, clips):
        num_tokens = len(re.findall(r"\w+|[.,]", answer["value"])) + 1
        assert 10 <= num_tokens <= 90
        assert len(answer["gold_spans"]) <= 0.35 * num_tokens


def test_no_gold_word_is_nearly_known_from_the_words_before_it(tmp_path: Path):
    """Who knows how often each word stands at a place after another one is still often wrong."""
    build_digits(tmp_path, num_train=3000, num_test=1, seed=5)
    seen: dict[tuple[Any, ...], Counter[str]] = defaultdict(Counter)
    for _, question, answer in exchanges(load(tmp_path / "train.json")):
        gold = gold_words(answer)
        asked = skeleton(question.removeprefix("<image>\n"))
        for place, word in enumerate(gold):
            for before in gold[:place] or [""]:
                seen[asked, place, before][word] += 1
    shares = [max(count.values()) / count.total() for count in seen.values() if count.total() > 60]
    assert len(shares) > 300
    assert max(shares) < 0.75


@pytest.mark.parametrize("num_frames", [None, 4])
def test_every_digit_is_drawn_in_its_cell_with_its_colour_and_size(num_frames: int | None):
    part = Split("test", handwritten("test"), 0, num_frames)
    rng = Random(0)
    for _ in range(30):
        scene = draw_scene(part, rng)
        pixels = np.asarray(render(scene)).astype(int)
        empty = np.ones((3, 3), dtype=bool)
        for placed in scene:
            row, column = ROWS.index(placed.shown.row), COLUMNS.index(placed.shown.column)
            empty[row, column] = False
            cell = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
            brightest = cell.reshape(-1, 3)[cell.sum(-1).argmax()]
            colours = np.array(list(COLOURS.values()))
            nearest = np.abs(colours - brightest).sum(1).argmin()
            assert list(COLOURS)[nearest] == placed.shown.colour
            inked = np.argwhere((cell != BACKGROUND).any(-1))
            assert max(np.ptp(inked, axis=0)) < SIZES[placed.shown.size]
        by_cell = pixels.reshape(3, CELL, 3, CELL, 3)
        plain = (by_cell == BACKGROUND).all(axis=(1, 3, 4))
        assert (plain == empty).all()


def test_digits_of_a_clip_appear_one_by_one_and_stay(clips: Path):
    for record in load(clips / "train.json")[:30]:
        paths = sorted((clips / record["video"]).iterdir())
        frames = [np.asarray(Image.open(path)) for path in paths]
        assert len(frames) == 3
        is_drawn = [[cell_is_drawn(frame, shown) for shown in record["scene"]] for frame in frames]
        assert is_drawn == sorted(is_drawn)
        assert is_drawn[0][0]
        assert all(is_drawn[-1])
        assert all(drawn == sorted(drawn, reverse=True) for drawn in is_drawn)
        num_drawn = [sum(drawn) for drawn in is_drawn]
        assert set(np.diff([0, *num_drawn])) <= {0, 1}


def cell_is_drawn(frame: np.ndarray, shown: dict[str, str]) -> bool:
    top, left = CELL * ROWS.index(shown["row"]), CELL * COLUMNS.index(shown["column"])
    return bool((frame[top : top + CELL, left : left + CELL] != BACKGROUND).any())


@pytest.mark.parametrize("num_frames", [0, 1])
def test_a_clip_of_less_than_two_frames_is_refused(tmp_path: Path, num_frames: int):
    with pytest.raises(ValueError, match=f"a clip needs at least 2 frames, got {num_frames}"):
        build_digits(tmp_path, num_train=1, num_test=1, seed=0, num_frames=num_frames)


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0)])
def test_an_empty_part_is_refused(tmp_path: Path, numbers: tuple[int, int]):
    num_train, num_test = numbers
    with pytest.raises(ValueError, match="needs at least 1 sample, got 0"):
        build_digits(tmp_path, num_train=num_train, num_test=num_test, seed=0)
    assert not any(tmp_path.iterdir())


def test_only_what_was_seen_is_gold_in_a_filled_template():
    answer = fill("The {digit} is {colour}.", {"digit": "two"}, {"colour": "red"})
    assert answer == Answer("The two is red.", ((11, 14),))
    assert answer + answer == Answer("The two is red." * 2, ((11, 14), (26, 29)))
