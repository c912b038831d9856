"""Make a task's student in four phases: its backbone beside its tower, then both together.

    text     the backbone learns the training set's answers, without the images
    tower    the vision tower learns to tell what stands in each cell of a picture
    words    the projector learns to express it in the backbone's own word embeddings
    align    projector and backbone learn from a mix of notes on pictures and text

The student then knows how answers are phrased and how to look at a place or for a thing, but it has
never answered a question with an image: it learns that in fine-tuning. Each phase is cached; see
``finished_phase``.

Shapes: B samples, T positions, K kept positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from regate_ds.algorithm.batch import IGNORE
from regate_ds.data.collate import SampleDataset
from regate_ds.data.llava.encode import Encoder
from regate_ds.data.llava.read import read_records
from regate_ds.data.llava.records import Record
from regate_ds.data.llava.sample import EncodedSample
from regate_ds.data.llava.template import Template
from regate_ds.recipe.students.llava import build_llava
from regate_ds.recipe.students.load import load_student
from regate_ds.recipe.students.student import Student, save_student
from regate_ds.recipe.tasks.pretraining.alignment import AlignConfig, Material, align_student
from regate_ds.recipe.tasks.pretraining.lessons import Lessons
from regate_ds.recipe.tasks.pretraining.phase import (
    PhaseConfig,
    digest_of_files,
    finished_phase,
    on_ranks,
    optimise,
    side_by_side,
)
from regate_ds.recipe.tasks.pretraining.thinning import thin_image
from regate_ds.recipe.tasks.pretraining.tokenizer import train_tokenizer
from regate_ds.recipe.tasks.pretraining.tower import learn_scenes, learn_words
from regate_ds.teacher.backbone import text_backbone
from regate_ds.teacher.scoring import teacher_inputs

_RANKS = 2
"""Processes that the last phase runs on; another number gives other weights."""

_POOL = 8
"""Number of text batches that are drawn at once and sorted by length, so that they pad little."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a task's phases learn from."""

    number: int
    """Part of every cache name; raise it when the code of a phase changes its result."""

    lessons: Callable[[], Lessons]
    """A function of a module, which each phase's process calls."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Sizes of the student and length of each phase."""

    text: dict[str, Any]
    """Hugging Face config of the backbone, with ``model_type``."""

    vision: dict[str, Any]
    """Hugging Face config of the tower; its image is a picture, its patches divide a cell."""

    vocab_size: int = 448
    max_length: int = 288
    seed: int = 0
    text_phase: PhaseConfig = PhaseConfig(
        steps=200, batch=16, lr=2e-3, image_share=0.125, whole_every=8
    )
    tower_phase: PhaseConfig = PhaseConfig(steps=400, batch=16, lr=6e-3)
    words_phase: PhaseConfig = PhaseConfig(steps=800, batch=512, lr=1e-2)
    words_scenes: int = 400
    """Pictures that the projector's phase learns from."""

    align_phase: AlignConfig = AlignConfig(
        steps=260, batch=32, lr=3e-3, image_share=0.25, whole_every=8
    )


class _Source(NamedTuple):
    records: Sequence[Record]
    recipe: Recipe


def make_task_student(train: Path, cache: Path, recipe: Recipe, config: PretrainConfig) -> Path:
    """Return the student's folder, made from the records in ``train`` or found in ``cache``."""
    records, _ = read_records(train, name="pretrain")
    source = _Source(records, recipe)
    images = (image for record in records for image in record.images)
    data = digest_of_files([train, *images])
    settings = asdict(config)
    tower = {"tower_phase": settings.pop("tower_phase")}
    words = {k: settings.pop(k) for k in [k for k in settings if k.startswith("words")]}
    align = {k: settings.pop(k) for k in [k for k in settings if k.startswith("align")]}
    text_basis, make_text = [recipe.number, data, settings], partial(_make_text, records, config)
    make_tower = partial(_make_tower, source, config)
    first, second = side_by_side(
        partial(finished_phase, cache, "text", text_basis, make_text),
        partial(finished_phase, cache, "tower", [*text_basis, tower], make_tower),
    )
    make_words = partial(_make_words, recipe, config, first, second)
    third = finished_phase(cache, "words", [first.name, second.name, words], make_words)
    make_aligned = partial(_make_aligned, source, config, third)
    return finished_phase(cache, "student", [third.name, align], make_aligned)


def _make_text(records: Sequence[Record], config: PretrainConfig, out: Path) -> None:
    save_student(learn_text(records, config), out)


def _make_tower(source: _Source, config: PretrainConfig, out: Path) -> None:
    student = fresh_student(source.records, config)
    learn_scenes(student, source.recipe.lessons(), config.tower_phase, seed=config.seed)
    save_student(student, out)


def _make_words(recipe: Recipe, config: PretrainConfig, text: Path, tower: Path, out: Path) -> None:
    student, seeing = load_student(text), load_student(tower)
    trained: Any = seeing.model.model
    student.model.model.vision_tower.load_state_dict(trained.vision_tower.state_dict())
    phase, number = config.words_phase, config.words_scenes
    learn_words(student, recipe.lessons(), phase, num_scenes=number, seed=config.seed)
    save_student(student, out)


def _make_aligned(source: _Source, config: PretrainConfig, words: Path, out: Path) -> None:
    on_ranks(_RANKS, partial(_align, source, config, words, out))


def _align(
    source: _Source, config: PretrainConfig, words: Path, out: Path, ranks: ProcessGroup
) -> None:
    student = load_student(words)
    texts = SampleDataset(source.records, encoder_of(student, config.max_length))
    material = Material(source.recipe.lessons(), texts)
    align_student(student, material, config.align_phase, seed=config.seed, ranks=ranks)
    if ranks.rank() == 0:
        save_student(student, out)


def encoder_of(student: Student, max_length: int) -> Encoder:
    return Encoder(
        student.tokenizer,
        image_token=student.image_token,
        num_image_tokens=student.vision.num_tokens,
        max_length=max_length,
        template=Template(),
    )


def fresh_student(records: Sequence[Record], config: PretrainConfig) -> Student:
    """Make a student with fresh weights and a tokenizer of the records' own text."""
    texts = [text for record in records for t in record.turns for text in (t.question, t.answer)]
    tokenizer = train_tokenizer(texts, vocab_size=config.vocab_size)
    return build_llava(tokenizer, text=config.text, vision=config.vision, seed=config.seed)


def learn_text(records: Sequence[Record], config: PretrainConfig) -> Student:
    """Make a student and train its backbone on the answers, in the form that the teacher sees."""
    student = fresh_student(records, config)
    encoder = encoder_of(student, config.max_length)
    samples = [encoder.encode(record) for record in records]
    # The backbone's weights are the student's own storage: training it trains the student.
    backbone: Any = text_backbone(student.model).train()
    pool: list[list[EncodedSample]] = []
    shares = config.text_phase.image_shares()

    def loss(rng: Random) -> Tensor:
        if not pool:
            pool.extend(_batches_of_like_length(samples, config.text_phase.batch, rng))
        batch = pool.pop()
        ids_BT = teacher_inputs(
            [s.input_ids_S for s in batch], [s.is_placeholder_S for s in batch], student.pad_id
        ).input_ids_BT
        labels_BT = nn.utils.rnn.pad_sequence([s.labels_S for s in batch], True, IGNORE)
        image_BT = nn.utils.rnn.pad_sequence([s.image_S for s in batch], True, -1)
        kept_BK = thin_image(image_BT >= 0, next(shares), rng)
        # Under a causal mask no token sees the padding on its right, so no mask is needed.
        hidden_BKH = backbone.model(
            input_ids=ids_BT.gather(1, kept_BK), position_ids=kept_BK, use_cache=False
        ).last_hidden_state
        return _answer_loss(backbone, hidden_BKH, labels_BT.gather(1, kept_BK))

    optimise("text backbone", backbone, loss, config.text_phase, config.seed)
    return student


def _answer_loss(model: Any, hidden_BKH: Tensor, labels_BK: Tensor) -> Tensor:
    is_label_BK = labels_BK != IGNORE
    return F.cross_entropy(model.lm_head(hidden_BKH[is_label_BK]), labels_BK[is_label_BK])


def _batches_of_like_length(
    samples: Sequence[EncodedSample], size: int, rng: Random
) -> list[list[EncodedSample]]:
    drawn = sorted(rng.sample(samples, min(_POOL * size, len(samples))), key=len)
    batches = [drawn[i : i + size] for i in range(0, len(drawn), size)]
    rng.shuffle(batches)
    return batches
