"""The last phase of a student: projector and backbone learn together to look at the image.

They learn from notes on crowded scenes, which lie between captions and questions: a note names a
place or a digit, and the rest of it must be read from the image. The data set's answers are mixed
in as text, so that the backbone keeps what it knows; its questions never come with an image here.

Shapes: B samples, T positions, S positions of one sample, N label positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regate_ds.algorithm.batch import IGNORE, number_runs, shift_labels
from regate_ds.data.collate import Collator, LoadedSample, SampleDataset
from regate_ds.data.llava.sample import EncodedSample
from regate_ds.recipe.students.student import Student
from regate_ds.recipe.tasks.digits.phase import PhaseConfig, optimise
from regate_ds.recipe.tasks.digits.questions import Shown
from regate_ds.recipe.tasks.digits.scenes import Split, handwritten, render
from regate_ds.recipe.tasks.digits.tower import Cells, crowded_scene

_MOST_NOTES = 6
"""Largest number of notes on a scene, so that rows have about the same length."""

_BY_PLACE = ("row", "column", "digit", "colour", "size")
_BY_DIGIT = ("digit", "colour", "size", "row", "column")


def align_student(
    student: Student, texts: SampleDataset, phase: PhaseConfig, *, text_share: float, seed: int
) -> None:
    """Train projector and backbone on scenes' notes and, for ``text_share`` of a batch, on text.

    The tower is frozen: gradients of a backbone that does not use the image yet would ruin it.
    """
    part = Split("train", handwritten("train"), seed, None)
    collator = Collator(pad_id=student.tokenizer.pad_token_id, vision=student.vision)
    model = student.model.train()
    model.model.vision_tower.requires_grad_(False)
    num_text = min(round(text_share * phase.batch), len(texts))
    tokens_of: dict[str, list[int]] = {}

    def loss(rng: Random) -> Tensor:
        scenes = [crowded_scene(part, rng) for _ in range(phase.batch - num_text)]
        noted = [_note_sample(student, cells, rng, tokens_of) for cells in scenes]
        drawn = [texts[number] for number in rng.sample(range(len(texts)), num_text)]
        unseen = [_without_image(sample, student.tokenizer.pad_token_id) for sample in drawn]
        # Notes and text run apart: notes are far shorter, and padding costs as much as text.
        states = [_label_states(model, collator, samples) for samples in (noted, unseen) if samples]
        hidden_NH, labels_N = (torch.cat(parts) for parts in zip(*states))
        return F.cross_entropy(model.lm_head(hidden_NH), labels_N)

    optimise("alignment", model, loss, phase, seed)
    model.requires_grad_(True)


def notes(cells: Cells, rng: Random) -> list[tuple[str, bool]]:
    """Return words on some cells of a scene, each with whether it must be read from the image.

    A note names a place, or a digit that the scene shows once, and adds the rest in fixed order.
    """
    shown = [placed.shown for placed in cells.values()]
    digits = [each.digit for each in shown]
    words: list[tuple[str, bool]] = []
    for each in rng.sample(shown, min(_MOST_NOTES, len(shown))):
        by_digit = digits.count(each.digit) == 1 and rng.random() < 0.5
        words += _note(each, *((_BY_DIGIT, 1) if by_digit else (_BY_PLACE, 2)))
    return words


def _note(shown: Shown, order: tuple[str, ...], num_given: int) -> list[tuple[str, bool]]:
    words = [(f" {getattr(shown, name)}", i >= num_given) for i, name in enumerate(order)]
    return [*words, (".", False)]


def _note_sample(
    student: Student, cells: Cells, rng: Random, tokens_of: dict[str, list[int]]
) -> LoadedSample:
    """Encode one scene with its notes; ``tokens_of`` caches the tokens of each word."""
    image = render(list(cells.values()))
    num_image = student.vision.num_tokens(image.size)
    ids = [student.tokenizer.bos_token_id, *[student.model.config.image_token_id] * num_image]
    is_answer = [False] * len(ids)
    for word, is_seen in notes(cells, rng):
        if word not in tokens_of:
            tokens_of[word] = student.tokenizer(word, add_special_tokens=False)["input_ids"]
        tokens = tokens_of[word]
        ids += tokens
        is_answer += [is_seen] * len(tokens)
    ids_S = torch.tensor(ids)
    encoded = EncodedSample(
        key=("notes", 0),
        input_ids_S=ids_S,
        labels_S=shift_labels(torch.where(torch.tensor(is_answer), ids_S, IGNORE)[None])[0],
        image_S=number_runs(ids_S == student.model.config.image_token_id),
        char_spans=(),
        images=(),
    )
    return LoadedSample(encoded, (image,))


def _label_states(
    model: Any, collator: Collator, samples: Sequence[LoadedSample]
) -> tuple[Tensor, Tensor]:
    """Return the last hidden state [N, H] and the target [N] of each label position."""
    batch = collator(samples)
    hidden_BTH = model.model(**batch.inputs, use_cache=False).last_hidden_state
    is_label_BT = batch.tokens.is_label_BT
    return hidden_BTH[is_label_BT], batch.tokens.labels_BT[is_label_BT]


def _without_image(sample: LoadedSample, pad_id: int) -> LoadedSample:
    """Return the sample as the teacher sees it: the pad id at image positions, and no image."""
    encoded = sample.encoded
    ids_S = encoded.input_ids_S.masked_fill(encoded.is_placeholder_S, pad_id)
    none_S = torch.full_like(ids_S, -1)
    return LoadedSample(replace(encoded, input_ids_S=ids_S, image_S=none_S, images=()), ())
