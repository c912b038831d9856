"""What a task tells the phases of its student, and a grid that is no square."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch

from regate_ds.data.collate import SampleDataset
from regate_ds.recipe.students.llava import build_llava
from regate_ds.recipe.students.student import Student
from regate_ds.recipe.tasks.digits.lessons import digits_lessons
from regate_ds.recipe.tasks.pretraining import tower as t
from regate_ds.recipe.tasks.pretraining.alignment import AlignConfig, Material, align_student
from regate_ds.recipe.tasks.pretraining.lessons import Lessons
from regate_ds.recipe.tasks.pretraining.own_cell import look_at_own_cell
from regate_ds.recipe.tasks.pretraining.phase import PhaseConfig
from regate_ds.recipe.tasks.pretraining.student import encoder_of
from regate_ds.recipe.tasks.pretraining.tokenizer import train_tokenizer
from regate_ds.recipe.tasks.shapes.lessons import shapes_lessons
from regate_ds.recipe.tasks.shapes.task import VISION
from regate_ds.recipe.tasks.table import TASKS
from tests.support.small_corpus import TEXT

SMALL = {**VISION, "intermediate_size": 64}


def small_student(lessons: Lessons) -> Student:
    words = " ".join(word for kind in t._choices(lessons) for word in kind)
    return build_llava(train_tokenizer([words], vocab_size=320), text=TEXT, vision=SMALL, seed=0)


@pytest.mark.parametrize("lessons", [digits_lessons(), shapes_lessons()], ids=["digits", "shapes"])
def test_every_lesson_uses_the_words_that_the_task_declares(lessons: Lessons):
    rng = Random(0)
    for draw in (lessons.full, lessons.crowded):
        cells = draw(rng)
        for thing in cells.values():
            words = lessons.words_of(thing)
            assert len(words) == len(lessons.kinds)
            assert all(word in kind for kind, word in zip(lessons.kinds, words))
        assert cells.keys() <= set(range(len(lessons.places)))


def test_a_word_of_two_kinds_is_refused():
    with pytest.raises(ValueError, match="red: a word of two kinds"):
        replace(shapes_lessons(), rows=("top", "red"))


def test_a_grid_of_one_row_is_refused():
    with pytest.raises(ValueError, match="a grid of 1 x 5 cells; it needs at least 2 rows"):
        replace(shapes_lessons(), rows=("top",))


@pytest.mark.parametrize("side", [5, 6])
def test_patches_that_do_not_divide_the_cells_are_refused(side: int):
    with pytest.raises(ValueError, match=f"{side} x {side} patches cannot be cut into 2 x 5 cells"):
        shapes_lessons().patches_of_cell(side)


def test_a_fresh_tower_looks_at_its_own_cell_in_a_grid_that_is_no_square():
    lessons = shapes_lessons()
    student = small_student(lessons)
    tower: Any = student.model.model.vision_tower
    look_at_own_cell(tower, lessons)
    tower.set_attn_implementation("eager")
    pixels = student.vision.pixels([lessons.render(lessons.crowded(Random(0))) for _ in range(2)])
    for layer in tower(**pixels, output_attentions=True).attentions:
        # 10 x 10 patches, 5 x 2 of them in a cell; the class token comes before them.
        weights = layer[:, :, 1:, 1:].unflatten(3, (10, 10)).unflatten(2, (10, 10))
        for head in range(10):
            for row in range(10):
                for column in range(10):
                    place = row // 5 * 5 + head // 2, column // 2 * 2 + head % 2
                    assert (weights[:, head, row, column, *place] > 0.9).all()


def test_patches_are_grouped_by_the_cells_in_which_they_lie():
    number_BPF = torch.arange(100.0).view(1, 100, 1)
    by_cell = t._by_cell(number_BPF, shapes_lessons(), 10)
    assert by_cell.shape == (1, 10, 10, 1)
    assert by_cell[0, 6].flatten().tolist() == [10 * r + c for r in range(5, 10) for c in (2, 3)]


def test_the_words_of_a_cell_lie_at_all_of_its_patches():
    lessons = shapes_lessons()
    student = small_student(lessons)
    cells = lessons.crowded(Random(1))
    directions = t._directions(student, lessons)
    words_PH = t._words(student, lessons, cells, 10)
    for row in range(10):
        for column in range(10):
            cell = row // 5 * 5 + column // 2
            wanted = sum(directions[word] for word in lessons.places[cell])
            if cell in cells:
                wanted += sum(directions[word] for word in lessons.words_of(cells[cell]))
            assert torch.allclose(words_PH[10 * row + column], wanted, atol=1e-6)


def test_each_phase_trains_its_part_of_a_student_of_shapes():
    lessons = shapes_lessons()
    student = small_student(lessons)
    phase = PhaseConfig(steps=1, batch=2, lr=1e-3)
    align = AlignConfig(steps=1, batch=2, lr=1e-3, image_share=0.25)
    texts = SampleDataset([], encoder_of(student, 256))
    for moving, train in (
        ("vision_tower", lambda: t.learn_scenes(student, lessons, phase, seed=0)),
        ("projector", lambda: t.learn_words(student, lessons, phase, num_scenes=2, seed=0)),
        ("layers", lambda: align_student(student, Material(lessons, texts), align, seed=0)),
    ):
        before = {n: p.detach().clone() for n, p in student.model.named_parameters()}
        train()
        moved = {n for n, p in student.model.named_parameters() if not torch.equal(p, before[n])}
        assert any(moving in name for name in moved)
        assert any("vision_tower" in name for name in moved) == (moving == "vision_tower")


def test_each_task_has_a_configuration_that_is_there():
    assert TASKS.keys() >= {"digits", "shapes"}
    for task in TASKS.values():
        assert task.config.is_file()
