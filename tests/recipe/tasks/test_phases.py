"""The stages that prepare the quickstart's student."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch

from regate_ds.data.collate import SampleDataset
from regate_ds.data.llava.read import read_records
from regate_ds.recipe.students.llava import build_llava
from regate_ds.recipe.students.load import load_student
from regate_ds.recipe.students.student import Student
from regate_ds.recipe.tasks.digits import tower as s
from regate_ds.recipe.tasks.digits.alignment import align_student, notes
from regate_ds.recipe.tasks.digits.phase import PhaseConfig, finished_phase, optimise
from regate_ds.recipe.tasks.digits.questions import DIGITS, Shown
from regate_ds.recipe.tasks.digits.scenes import Split, handwritten
from regate_ds.recipe.tasks.digits.student import encoder_of
from regate_ds.recipe.tasks.digits.tokenizer import train_tokenizer
from regate_ds.recipe.tasks.digits.tower import learn_words
from tests.support.small_corpus import TEXT, VISION, make_corpus

PART = Split("train", handwritten("train"), 0, None)

FINE = {**VISION, "patch_size": 8}
"""Patches that divide a cell of the grid."""


def touch(out: Path) -> None:
    (out / "made").touch()


def test_a_finished_stage_is_made_once_for_each_basis(tmp_path: Path):
    first = finished_phase(tmp_path, "text", [1], touch)
    assert (first / "made").exists()
    again = finished_phase(tmp_path, "text", [1], lambda out: pytest.fail("made again"))
    assert again == first
    assert finished_phase(tmp_path, "text", [2], touch) != first


def test_a_stage_that_dies_leaves_nothing_that_looks_finished(tmp_path: Path):
    def die(out: Path) -> None:
        touch(out)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        finished_phase(tmp_path, "text", [1], die)
    assert not list(tmp_path.glob("text-*"))
    assert (finished_phase(tmp_path, "text", [1], touch) / "made").exists()


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": 0}, {"lr": 0.0}])
def test_an_empty_stage_is_refused(wrong: dict[str, float]):
    with pytest.raises(ValueError, match="must be at least 1 and lr above 0"):
        PhaseConfig(**{"steps": 1, "batch": 1, "lr": 1e-3, **wrong})


def test_the_same_seed_trains_the_same_weights():
    def trained() -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)

        def loss(rng: Random) -> torch.Tensor:
            return (model(torch.tensor([rng.random() for _ in range(3)])) - 1.0).square().sum()

        optimise("test", model, loss, PhaseConfig(steps=5, batch=1, lr=0.1), seed=1)
        return model.weight.detach()

    assert torch.equal(trained(), trained())


def test_the_projector_learns_the_words_of_the_cells_and_nothing_else_moves():
    words = "zero one two three four five six seven eight nine red green blue yellow purple white"
    tokenizer = train_tokenizer([f"a {words} small large top middle bottom left"], vocab_size=320)
    student = build_llava(tokenizer, text=TEXT, vision=FINE, seed=0)
    before = {n: p.detach().clone() for n, p in student.model.named_parameters()}
    one, many = (PhaseConfig(steps=n, batch=64, lr=1e-2) for n in (1, 60))
    early = distance(student, one)
    late = distance(student, many)
    assert late < early
    for name, weight in student.model.named_parameters():
        assert torch.equal(weight, before[name]) == ("projector" not in name), name


def test_notes_tell_what_stands_at_a_place_or_where_a_digit_stands():
    rng = Random(0)
    for _ in range(50):
        cells = s.crowded_scene(PART, rng)
        told = notes(cells, rng)
        shown = [placed.shown for placed in cells.values()]
        for start in range(0, len(told), 6):
            words = [word.strip() for word, _ in told[start : start + 6]]
            seen = [is_seen for _, is_seen in told[start : start + 6]]
            if words[0] in DIGITS:
                digit, colour, size, row, column, stop = words
                assert [each.digit for each in shown].count(digit) == 1
                assert seen == [False, True, True, True, True, False]
            else:
                row, column, digit, colour, size, stop = words
                assert seen == [False, False, True, True, True, False]
            assert Shown(digit, colour, size, row, column) in shown
            assert stop == "."


def test_alignment_trains_projector_and_backbone_and_spares_the_tower(tmp_path: Path):
    make_corpus(tmp_path, num_train=4, num_test=1)
    student = load_student(tmp_path / "student")
    records, _ = read_records(tmp_path / "data" / "train.json", name="mine")
    texts = SampleDataset(records, encoder_of(student, 256))
    before = {n: p.detach().clone() for n, p in student.model.named_parameters()}
    stage = PhaseConfig(steps=3, batch=4, lr=1e-3)
    align_student(student, texts, stage, text_share=0.25, seed=0)
    for name, weight in student.model.named_parameters():
        assert weight.requires_grad
        if "vision_tower" in name:
            assert torch.equal(weight, before[name]), name
        elif "projector" in name or "language_model.layers" in name:
            assert not torch.equal(weight, before[name]), name


def distance(student: Student, stage: PhaseConfig) -> float:
    """Error of the projector after a stage, relative to the words' size, on the same scenes."""
    learn_words(student, stage, num_scenes=8, seed=0)
    rng = Random(0)
    scenes = [s.crowded_scene(PART, rng) for _ in range(8)]
    side = FINE["image_size"] // FINE["patch_size"]
    with torch.no_grad():
        wanted = torch.cat([s._words(student, cells, side) for cells in scenes])
        features = s._features(student, scenes).flatten(0, 1)
        error = student.model.model.multi_modal_projector(features) - wanted
    return float(error.square().sum() / wanted.square().sum())
