"""The last phase of a student: projector and backbone learn together to look at the image.

They learn from notes on crowded pictures, which lie between captions and questions: a note names
what it is about, and the rest of it must be read from the image. The data set's answers are mixed
in as text, so that the backbone keeps what it knows; its questions never come with an image here.

Shapes: B samples, T positions, K kept positions, S positions of one sample, N label positions,
H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from regate_ds.algorithm.batch import IGNORE, number_runs, shift_labels
from regate_ds.data.collate import Batch, Collator, LoadedSample, SampleDataset
from regate_ds.data.llava.sample import EncodedSample
from regate_ds.recipe.students.student import Student
from regate_ds.recipe.tasks.pretraining.lessons import Cells, Lessons
from regate_ds.recipe.tasks.pretraining.phase import PhaseConfig, average_gradients, optimise
from regate_ds.recipe.tasks.pretraining.thinning import thin_image


@dataclass(frozen=True, kw_only=True)
class AlignConfig(PhaseConfig):
    """Length, batch and learning rate of the last phase, and what its batches hold."""

    text_share: float = 0.25
    """Share of a batch that is answers of the data set, without their image."""


class Material(NamedTuple):
    """What the phase learns from."""

    lessons: Lessons
    texts: SampleDataset


def align_student(
    student: Student,
    material: Material,
    phase: AlignConfig,
    *,
    seed: int,
    ranks: ProcessGroup | None = None,
) -> None:
    """Train projector and backbone on pictures' notes and, for a part of each batch, on text.

    The tower is frozen: gradients of a backbone that does not use the image yet would ruin it.
    With ``ranks``, each of them draws its part of every batch.
    """
    lessons, texts = material
    num_ranks, rank = (1, 0) if ranks is None else (ranks.size(), ranks.rank())
    batch = phase.batch // num_ranks
    collator = Collator(pad_id=student.pad_id, vision=student.vision)
    model = student.model.train()
    model.model.vision_tower.requires_grad_(False)
    if ranks is not None:
        average_gradients(model, ranks)
    num_text = min(round(phase.text_share * batch), len(texts))
    tokens_of: dict[str, list[int]] = {}
    shares = phase.image_shares()

    def loss(rng: Random) -> Tensor:
        pictures = [lessons.crowded(rng) for _ in range(batch - num_text)]
        noted = [_note_sample(student, lessons, cells, rng, tokens_of) for cells in pictures]
        drawn = [texts[number] for number in rng.sample(range(len(texts)), num_text)]
        unseen = [_without_image(sample, student.pad_id) for sample in drawn]
        # Notes and text run apart: notes are far shorter, and padding costs as much as text.
        share = next(shares)
        states = [
            _label_states(model, collator(samples), share, rng)
            for samples in (noted, unseen)
            if samples
        ]
        hidden_NH, labels_N = (torch.cat(parts) for parts in zip(*states))
        return F.cross_entropy(model.lm_head(hidden_NH), labels_N)

    optimise("alignment", model, loss, phase, num_ranks * seed + rank)
    model.requires_grad_(True)


def _note_sample(
    student: Student,
    lessons: Lessons,
    cells: Cells,
    rng: Random,
    tokens_of: dict[str, list[int]],
) -> LoadedSample:
    """Encode one picture with its notes; ``tokens_of`` caches the tokens of each word."""
    image = lessons.render(cells)
    num_image = student.vision.num_tokens(image.size)
    ids = [student.tokenizer.bos_token_id, *[student.model.config.image_token_id] * num_image]
    is_answer = [False] * len(ids)
    for word, is_seen in lessons.notes(cells, rng):
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


def _label_states(model: Any, batch: Batch, share: float, rng: Random) -> tuple[Tensor, Tensor]:
    """Return the last hidden state [N, H] and the target [N] of each label position.

    The decoder sees a ``share`` of the image tokens.
    """
    assert batch.tokens.image_BT is not None
    is_image_BT = batch.tokens.image_BT >= 0
    embeddings_BTH = model.get_input_embeddings()(batch.inputs["input_ids"])
    if "pixel_values" in batch.inputs:
        patches = model.model.vision_tower(batch.inputs["pixel_values"]).last_hidden_state[:, 1:]
        image = model.model.multi_modal_projector(patches)
        embeddings_BTH = embeddings_BTH.masked_scatter(is_image_BT[..., None], image)
    kept_BK = thin_image(is_image_BT, share, rng)
    every_BKH = kept_BK[..., None].expand(-1, -1, embeddings_BTH.shape[-1])
    hidden_BKH = model.model.language_model(
        inputs_embeds=embeddings_BTH.gather(1, every_BKH), position_ids=kept_BK, use_cache=False
    ).last_hidden_state
    labels_BK = batch.tokens.labels_BT.gather(1, kept_BK)
    is_label_BK = labels_BK != IGNORE
    return hidden_BKH[is_label_BK], labels_BK[is_label_BK]


def _without_image(sample: LoadedSample, pad_id: int) -> LoadedSample:
    """Return the sample as the teacher sees it: the pad id at image positions, and no image."""
    encoded = sample.encoded
    ids_S = encoded.input_ids_S.masked_fill(encoded.is_placeholder_S, pad_id)
    return LoadedSample(replace(encoded, input_ids_S=ids_S, images=()), ())
