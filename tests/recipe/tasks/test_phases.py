"""The stages that prepare the quickstart's student."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from regate_ds.data.collate import SampleDataset
from regate_ds.data.llava.read import read_records
from regate_ds.recipe.students.llava import build_llava, clip_processor
from regate_ds.recipe.students.load import load_student
from regate_ds.recipe.students.student import Student
from regate_ds.recipe.tasks.digits.lessons import digits_lessons, notes
from regate_ds.recipe.tasks.digits.questions import DIGITS, Shown
from regate_ds.recipe.tasks.pretraining import tower as s
from regate_ds.recipe.tasks.pretraining.alignment import AlignConfig, Material, align_student
from regate_ds.recipe.tasks.pretraining.own_cell import look_at_own_cell
from regate_ds.recipe.tasks.pretraining.phase import (
    PhaseConfig,
    finished_phase,
    on_ranks,
    optimise,
    side_by_side,
)
from regate_ds.recipe.tasks.pretraining.student import encoder_of
from regate_ds.recipe.tasks.pretraining.thinning import thin_image
from regate_ds.recipe.tasks.pretraining.tokenizer import train_tokenizer
from regate_ds.recipe.tasks.pretraining.tower import learn_words
from tests.recipe.tasks.phase_jobs_helper import check_gradients_are_averaged, touch
from tests.support.small_corpus import TEXT, VISION, make_corpus

LESSONS = digits_lessons()

FINE = {**VISION, "patch_size": 8}
"""Patches that divide a cell of the grid."""


def die(out: Path) -> None:
    touch(out)
    raise OSError("disk full")


def test_a_finished_stage_is_made_once_for_each_basis(tmp_path: Path):
    first = finished_phase(tmp_path, "text", [1], touch)
    assert (first / "made").exists()
    again = finished_phase(tmp_path, "text", [1], lambda out: pytest.fail("made again"))
    assert again == first
    assert finished_phase(tmp_path, "text", [2], touch) != first


def test_a_stage_that_dies_leaves_nothing_that_looks_finished(tmp_path: Path):
    with pytest.raises(OSError, match="disk full"):
        finished_phase(tmp_path, "text", [1], die)
    assert not list(tmp_path.glob("text-*"))
    assert (finished_phase(tmp_path, "text", [1], touch) / "made").exists()


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": 0}, {"lr": 0.0}])
def test_an_empty_stage_is_refused(wrong: dict[str, float]):
    with pytest.raises(ValueError, match="must be at least 1 and lr above 0"):
        PhaseConfig(**{"steps": 1, "batch": 1, "lr": 1e-3, **wrong})


def test_jobs_side_by_side_return_their_results_in_order(tmp_path: Path):
    jobs = [partial(finished_phase, tmp_path, name, [1], touch) for name in ("text", "tower")]
    assert [folder.name.split("-")[0] for folder in side_by_side(*jobs)] == ["text", "tower"]


def test_ranks_of_a_phase_train_on_the_mean_of_their_gradients():
    on_ranks(2, check_gradients_are_averaged)


def test_one_step_in_so_many_sees_the_whole_image():
    phase = PhaseConfig(steps=5, batch=1, lr=1e-3, image_share=0.25, whole_every=2)
    assert list(phase.image_shares()) == [0.25, 1.0, 0.25, 1.0, 0.25]


def test_a_thinned_image_loses_no_text_and_keeps_the_order():
    is_image_BT = torch.zeros(3, 20, dtype=torch.bool)
    is_image_BT[:, 1:9] = True
    kept_BK = thin_image(is_image_BT, 0.5, Random(0))
    assert (kept_BK.diff(dim=1) > 0).all()
    assert (is_image_BT.gather(1, kept_BK).sum(dim=1) == 4).all()
    assert all(set(range(9, 20)) | {0} <= set(row) for row in kept_BK.tolist())
    assert torch.equal(thin_image(is_image_BT, 1.0, Random(0)), torch.arange(20).expand(3, -1))


def fresh_tower(**settings: Any) -> Any:
    config = CLIPVisionConfig(**{**FINE, "num_attention_heads": 4, **settings})
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIPVisionModel(config)


def test_a_fresh_tower_looks_at_each_patch_of_the_own_cell_with_one_head():
    tower = fresh_tower()
    look_at_own_cell(tower, LESSONS)
    images = [LESSONS.render(LESSONS.crowded(Random(seed))) for seed in range(3)]
    pixels = clip_processor(FINE["image_size"])(images, return_tensors="pt")["pixel_values"]
    for layer in tower(pixels, output_attentions=True).attentions:
        # 6 x 6 patches, 2 x 2 of them in a cell; the class token comes before them.
        weights = layer[:, :, 1:, 1:].unflatten(3, (6, 6)).unflatten(2, (6, 6))
        for head, row, column in itertools.product(range(4), range(6), range(6)):
            seen = weights[
                :, head, row, column, row // 2 * 2 + head // 2, column // 2 * 2 + head % 2
            ]
            assert (seen > 0.9).all()


def test_a_tower_without_a_head_for_each_patch_of_a_cell_is_refused():
    with pytest.raises(ValueError, match="2 heads for 4 patches of a cell; set num_attention_head"):
        look_at_own_cell(fresh_tower(num_attention_heads=2), LESSONS)


def test_every_patch_learns_what_its_cell_shows():
    phase = PhaseConfig(steps=120, batch=16, lr=1e-2)
    student = build_llava(
        train_tokenizer(["a"], vocab_size=280),
        text=TEXT,
        vision={**FINE, "num_attention_heads": 4},
        seed=0,
    )
    before = {n: p.detach().clone() for n, p in student.model.named_parameters()}
    s.learn_scenes(student, LESSONS, phase, seed=0)
    moved = {n for n, p in student.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("vision_tower" in name for name in moved)
    # A fresh tower gives 0.35.
    assert colour_is_read(student) > 0.8


def colour_is_read(student: Student) -> float:
    """Share of single patches from whose features a linear fit reads the colour of their cell."""
    rng, side = Random(1), FINE["image_size"] // FINE["patch_size"]
    scenes = [LESSONS.full(rng) for _ in range(40)]
    with torch.no_grad():
        features_NF = s._by_cell(s._features(student, LESSONS, scenes), LESSONS, side).flatten(0, 2)
    truth_N = torch.tensor([s._truth(LESSONS, cells) for cells in scenes])[..., 1].flatten()
    truth_N = truth_N.repeat_interleave((side // 3) ** 2)
    inputs = torch.cat([features_NF, torch.ones(len(features_NF), 1)], dim=1)
    half = len(inputs) // 2
    wanted = torch.nn.functional.one_hot(truth_N[:half]).float()
    fit = torch.linalg.lstsq(inputs[:half], wanted).solution
    return float(((inputs[half:] @ fit).argmax(dim=1) == truth_N[half:]).float().mean())


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
        cells = LESSONS.crowded(rng)
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
    stage = AlignConfig(steps=3, batch=4, lr=1e-3, image_share=0.25, text_share=0.25)
    align_student(student, Material(LESSONS, texts), stage, seed=0)
    for name, weight in student.model.named_parameters():
        assert weight.requires_grad
        if "vision_tower" in name:
            assert torch.equal(weight, before[name]), name
        elif "projector" in name or "language_model.layers" in name:
            assert not torch.equal(weight, before[name]), name


def distance(student: Student, stage: PhaseConfig) -> float:
    """Error of the projector after a stage, relative to the words' size, on the same scenes."""
    learn_words(student, LESSONS, stage, num_scenes=8, seed=0)
    rng = Random(0)
    scenes = [LESSONS.crowded(rng) for _ in range(8)]
    side = FINE["image_size"] // FINE["patch_size"]
    with torch.no_grad():
        wanted = torch.cat([s._words(student, LESSONS, cells, side) for cells in scenes])
        features = s._features(student, LESSONS, scenes).flatten(0, 1)
        error = student.model.model.multi_modal_projector(features) - wanted
    return float(error.square().sum() / wanted.square().sum())
