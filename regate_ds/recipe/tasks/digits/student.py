"""Make the quickstart's student in four phases: first its backbone and tower, then both together.

    text     the backbone learns the training set's answers, without the images
    tower    the vision tower learns to tell what stands in each cell of a scene
    words    the projector learns to express it in the backbone's own word embeddings
    align    projector and backbone learn from a mix of notes on scenes and text

The student then knows how answers are phrased and how to look at a place or for a digit, but it has
never answered a question with an image: it learns that in fine-tuning. Each phase is cached; see
``finished_phase``.

Shapes: B samples, T positions, N label positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from torch import Tensor, nn
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
from regate_ds.recipe.tasks.digits.alignment import align_student
from regate_ds.recipe.tasks.digits.phase import (
    PhaseConfig,
    digest_of_files,
    finished_phase,
    optimise,
)
from regate_ds.recipe.tasks.digits.tokenizer import train_tokenizer
from regate_ds.recipe.tasks.digits.tower import learn_scenes, learn_words
from regate_ds.teacher.backbone import text_backbone
from regate_ds.teacher.scoring import teacher_inputs

_RECIPE = 4
"""Part of every cache name; raise it when a phase's code changes its result."""

_POOL = 8
"""Number of text batches that are drawn at once and sorted by length, so that they pad little."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Sizes of the student and length of each phase."""

    text: dict[str, Any]
    """Hugging Face config of the backbone, with ``model_type``."""

    vision: dict[str, Any]
    """Hugging Face config of the tower; its image is a scene, its patch divides a cell."""

    vocab_size: int = 448
    max_length: int = 256
    seed: int = 0
    text_phase: PhaseConfig = PhaseConfig(steps=150, batch=32, lr=2e-3)
    tower_phase: PhaseConfig = PhaseConfig(steps=500, batch=64, lr=4e-3)
    words_phase: PhaseConfig = PhaseConfig(steps=800, batch=512, lr=1e-2)
    words_scenes: int = 1536
    """Scenes that the projector's phase learns from."""

    align_phase: PhaseConfig = PhaseConfig(steps=400, batch=32, lr=3e-3)
    align_text_share: float = 0.25
    """Share of the last phase's samples that are answers of the data set, without their image."""


def make_digits_student(train: Path, cache: Path, config: PretrainConfig) -> Path:
    """Return the student's folder, made from the records in ``train`` or found in ``cache``."""
    records, _ = read_records(train, name="pretrain")
    images = (image for record in records for image in record.images)
    settings = asdict(config)
    words = {k: v for k, v in settings.items() if k.startswith("words")}
    align = {k: v for k, v in settings.items() if k.startswith("align")}
    tower = {"tower_phase": settings["tower_phase"]}
    text = {k: v for k, v in settings.items() if k not in words | align | tower}

    def make_text(out: Path) -> None:
        save_student(learn_text(records, config), out)

    def make_tower(out: Path) -> None:
        student = load_student(first)
        learn_scenes(student, config.tower_phase, seed=config.seed)
        save_student(student, out)

    def make_words(out: Path) -> None:
        student = load_student(second)
        phase, number = config.words_phase, config.words_scenes
        learn_words(student, phase, num_scenes=number, seed=config.seed)
        save_student(student, out)

    def make_aligned(out: Path) -> None:
        student = load_student(third)
        texts = SampleDataset(records, encoder_of(student, config.max_length))
        phase, share = config.align_phase, config.align_text_share
        align_student(student, texts, phase, text_share=share, seed=config.seed)
        save_student(student, out)

    data = digest_of_files([train, *images])
    first = finished_phase(cache, "text", [_RECIPE, data, text], make_text)
    second = finished_phase(cache, "tower", [first.name, tower], make_tower)
    third = finished_phase(cache, "words", [second.name, words], make_words)
    return finished_phase(cache, "student", [third.name, align], make_aligned)


def encoder_of(student: Student, max_length: int) -> Encoder:
    return Encoder(
        student.tokenizer,
        image_token=student.image_token,
        num_image_tokens=student.vision.num_tokens,
        max_length=max_length,
        template=Template(),
    )


def learn_text(records: Sequence[Record], config: PretrainConfig) -> Student:
    """Make a student and train its backbone on the answers, in the form that the teacher sees."""
    texts = [text for record in records for t in record.turns for text in (t.question, t.answer)]
    tokenizer = train_tokenizer(texts, vocab_size=config.vocab_size)
    student = build_llava(tokenizer, text=config.text, vision=config.vision, seed=config.seed)
    encoder = encoder_of(student, config.max_length)
    samples = [encoder.encode(record) for record in records]
    # The backbone's weights are the student's own storage: training it trains the student.
    backbone: Any = text_backbone(student.model).train()
    pool: list[list[EncodedSample]] = []

    def loss(rng: Random) -> Tensor:
        if not pool:
            pool.extend(_batches_of_like_length(samples, config.text_phase.batch, rng))
        batch = pool.pop()
        ids_BT = teacher_inputs(
            [s.input_ids_S for s in batch],
            [s.is_placeholder_S for s in batch],
            tokenizer.pad_token_id,
        ).input_ids_BT
        labels_BT = nn.utils.rnn.pad_sequence([s.labels_S for s in batch], True, IGNORE)
        # Under a causal mask no token sees the padding on its right, so no mask is needed.
        hidden_BTH = backbone.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        return _answer_loss(backbone, hidden_BTH, labels_BT)

    optimise("text backbone", backbone, loss, config.text_phase, config.seed)
    return student


def _answer_loss(model: Any, hidden_BTH: Tensor, labels_BT: Tensor) -> Tensor:
    is_label_BT = labels_BT != IGNORE
    return F.cross_entropy(model.lm_head(hidden_BTH[is_label_BT]), labels_BT[is_label_BT])


def _batches_of_like_length(
    samples: Sequence[EncodedSample], size: int, rng: Random
) -> list[list[EncodedSample]]:
    drawn = sorted(rng.sample(samples, min(_POOL * size, len(samples))), key=len)
    batches = [drawn[i : i + size] for i in range(0, len(drawn), size)]
    rng.shuffle(batches)
    return batches
