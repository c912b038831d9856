"""Make the quickstart's student on the spot: a backbone, a tower, and the two brought together.

    text     the backbone learns the training set's text, images replaced as the teacher sees them
    tower    the vision tower learns to tell what stands in each cell of a scene
    align    projector and backbone learn from image and text samples, mixed

Each stage is kept in a folder named by a hash of all that decides it, and appears there whole.

Shapes: B samples, T positions, P patches of an image, C cells of a scene, F features.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from regate_ds.algorithm.batch import IGNORE
from regate_ds.data.collate import Collator, LoadedSample, SampleDataset
from regate_ds.data.encode import Encoder, Template
from regate_ds.data.samples import Record, read_records
from regate_ds.teacher.text_only import teacher_inputs
from regate_ds.training.digit_questions import COLUMNS, DIGITS, ROWS
from regate_ds.training.digits import COLOURS, SIZES, Part, Placed, draw_scene, handwritten, render
from regate_ds.training.student import (
    Student,
    build_llava,
    load_student,
    save_student,
    text_backbone,
)
from regate_ds.training.tokenizer import train_tokenizer

_CHOICES = (list(DIGITS), list(COLOURS), list(SIZES))
"""What is told of each cell: digit, colour, size; each with one more class for an empty cell."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    steps: int
    batch: int
    lr: float


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Sizes of the student and length of each stage."""

    text: dict[str, Any]
    """Hugging Face config of the backbone, with ``model_type``."""

    vision: dict[str, Any]
    """Hugging Face config of the tower; its image is a scene, its patch divides a cell."""

    vocab_size: int = 512
    max_length: int = 256
    seed: int = 0
    text_stage: StageConfig = StageConfig(steps=250, batch=32, lr=3e-3)
    tower_stage: StageConfig = StageConfig(steps=400, batch=64, lr=2e-3)
    align_stage: StageConfig = StageConfig(steps=60, batch=32, lr=1e-3)
    align_text_share: float = 0.25
    """Share of the samples of the last stage that are shown without their image."""


def make_student(train: Path, cache: Path, config: PretrainConfig) -> Path:
    """Folder of the student, made from the records in ``train``, or found in ``cache``."""
    records, _ = read_records(train, name="pretrain")
    settings = asdict(config)
    content = hashlib.sha256(train.read_bytes()).hexdigest()
    fresh = {k: v for k, v in settings.items() if not k.startswith(("tower", "align"))}
    text = _stage(cache, "text", [content, fresh], lambda: learn_text(records, config))
    tower = _stage(
        cache, "tower", [text.name, settings["tower_stage"]], lambda: _learn_scenes(text, config)
    )
    align = {k: v for k, v in settings.items() if k.startswith("align")}
    return _stage(cache, "student", [tower.name, align], lambda: _align(records, tower, config))


def encoder_of(student: Student, max_length: int) -> Encoder:
    return Encoder(
        student.tokenizer,
        image_token=student.image_token,
        num_image_tokens=student.vision.num_tokens,
        max_length=max_length,
        template=Template(),
    )


def _stage(cache: Path, name: str, basis: list[Any], make: Callable[[], Student]) -> Path:
    """The folder of a finished stage; made under another name first, so that it appears whole."""
    digest = hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()
    folder = cache / f"{name}-{digest[:12]}"
    if folder.is_dir():
        return folder
    unfinished = cache / f".unfinished-{name}-{digest[:12]}"
    shutil.rmtree(unfinished, ignore_errors=True)
    save_student(make(), unfinished)
    unfinished.rename(folder)
    return folder


def learn_text(records: Sequence[Record], config: PretrainConfig) -> Student:
    """Next-token prediction on whole conversations; the images' own positions are no target."""
    texts = [text for record in records for t in record.turns for text in (t.question, t.answer)]
    tokenizer = train_tokenizer(texts, vocab_size=config.vocab_size)
    student = build_llava(tokenizer, text=config.text, vision=config.vision, seed=config.seed)
    data = SampleDataset(records, encoder_of(student, config.max_length))
    samples = [data.encode(number) for number in range(len(data))]
    backbone = text_backbone(student.model).train()
    pad_id = tokenizer.pad_token_id

    def loss(rng: Random) -> Tensor:
        batch = rng.sample(samples, min(config.text_stage.batch, len(samples)))
        inputs = teacher_inputs(
            [s.input_ids_S for s in batch], [s.is_placeholder_S for s in batch], pad_id
        )
        targets_BT = inputs.input_ids_BT.masked_fill(inputs.attention_mask_BT == 0, IGNORE)
        for row, sample in enumerate(batch):
            targets_BT[row, : len(sample)][sample.is_placeholder_S] = IGNORE
        # Right padding under a causal mask is never seen: no mask needed.
        logits_BTV = backbone(input_ids=inputs.input_ids_BT, use_cache=False).logits
        return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), targets_BT[:, 1:].flatten())

    _optimise("text backbone", backbone.parameters(), loss, config.text_stage, config.seed)
    return student


def _learn_scenes(folder: Path, config: PretrainConfig) -> Student:
    """Supervised: each cell's digit, colour and size, from the patches that cover the cell."""
    student = load_student(folder)
    tower = student.model.model.vision_tower.train()
    side = config.vision["image_size"] // config.vision["patch_size"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        heads = nn.ModuleList(
            nn.Linear(config.vision["hidden_size"] * (side // 3) ** 2, len(choices) + 1)
            for choices in _CHOICES
        )
    part = Part("train", handwritten("train"), config.seed, None)

    def loss(rng: Random) -> Tensor:
        scenes = [draw_scene(part, rng) for _ in range(config.tower_stage.batch)]
        pixels = student.vision.pixels([render(scene) for scene in scenes])
        patches_BPF = tower(**pixels).last_hidden_state[:, 1:]
        cells_BCF = _by_cell(patches_BPF, side)
        truth_BCX = torch.tensor([_truth(scene) for scene in scenes])
        return torch.stack(
            [
                F.cross_entropy(head(cells_BCF).flatten(0, 1), truth_BCX[..., x].flatten())
                for x, head in enumerate(heads)
            ]
        ).sum()

    weights = [*tower.parameters(), *heads.parameters()]
    _optimise("vision tower", weights, loss, config.tower_stage, config.seed)
    return student


def _align(records: Sequence[Record], folder: Path, config: PretrainConfig) -> Student:
    """Answers given image and question, and of some samples given the question alone."""
    student = load_student(folder)
    data = SampleDataset(records, encoder_of(student, config.max_length))
    pad_id = student.tokenizer.pad_token_id
    collator = Collator(pad_id=pad_id, vision=student.vision)
    model = student.model.train()
    model.model.vision_tower.requires_grad_(False)
    stage = config.align_stage
    num_text = round(config.align_text_share * stage.batch)

    def loss(rng: Random) -> Tensor:
        numbers = rng.sample(range(len(data)), min(stage.batch, len(data)))
        loaded = [data[number] for number in numbers]
        loaded = [*map(partial(_without_image, pad_id), loaded[:num_text]), *loaded[num_text:]]
        batch = collator(loaded)
        logits_BTV = model(**batch.inputs, use_cache=False).logits
        return F.cross_entropy(logits_BTV.flatten(0, 1), batch.tokens.labels_BT.flatten())

    trained = [p for p in model.parameters() if p.requires_grad]
    _optimise("alignment", trained, loss, stage, config.seed)
    return student


def _without_image(pad_id: int, sample: LoadedSample) -> LoadedSample:
    """The sample as the teacher sees it."""
    encoded = sample.encoded
    ids_S = encoded.input_ids_S.masked_fill(encoded.is_placeholder_S, pad_id)
    none_S = torch.zeros_like(encoded.is_placeholder_S)
    return LoadedSample(replace(encoded, input_ids_S=ids_S, is_placeholder_S=none_S, images=()), ())


def _by_cell(patches_BPF: Tensor, side: int) -> Tensor:
    """Join the features of the patches of each of the 3 x 3 cells: [B, 9, patches * F]."""
    batch, _, features = patches_BPF.shape
    in_cell = side // 3
    grid = patches_BPF.view(batch, 3, in_cell, 3, in_cell, features)
    return grid.transpose(2, 3).reshape(batch, 9, in_cell * in_cell * features)


def _truth(scene: list[Placed]) -> list[list[int]]:
    """Numbers of digit, colour and size for each cell; the last class stands for an empty one."""
    cells = [[len(choices) for choices in _CHOICES] for _ in range(9)]
    for shown in (placed.shown for placed in scene):
        cell = 3 * ROWS.index(shown.row) + COLUMNS.index(shown.column)
        words = (shown.digit, shown.colour, shown.size)
        cells[cell] = [choices.index(word) for choices, word in zip(_CHOICES, words)]
    return cells


def _optimise(
    name: str,
    weights: Iterable[nn.Parameter],
    loss: Callable[[Random], Tensor],
    stage: StageConfig,
    seed: int,
) -> None:
    """AdamW on a one-cycle schedule; ``loss`` draws its batch from the generator it is given."""
    optimizer = torch.optim.AdamW(weights, lr=stage.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=stage.lr, total_steps=stage.steps, pct_start=0.1
    )
    rng = Random(seed)
    with tqdm(range(stage.steps), unit="step", desc=name) as bar:
        for step in bar:
            value = loss(rng)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
            optimizer.step()
            schedule.step()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{float(value):.3f}")
