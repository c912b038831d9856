"""Count the words that need the image and that the model gets right when it answers freely.

The model answers the last turn of a sample (as cut by `data.max_length`) greedily, given the turns
before it. The generated words are aligned with the true answer's by their longest common
subsequence; a gold word is right if it is part of it.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from regate_ds.data.collate import LoadedSample, SampleDataset
from regate_ds.data.llava.records import Turn
from regate_ds.data.llava.sample import EncodedSample
from regate_ds.job.process import Process
from regate_ds.parallel.collectives import sum_over
from regate_ds.recipe.evaluation.forward import dense_inference
from regate_ds.recipe.evaluation.words import (
    HeldOut,
    Scores,
    counted_words,
    ratio,
    share_of_process,
)

_SPARE_TOKENS = 8
"""An answer may be this much longer than the longest true one of its batch."""


def evaluate_generated(
    model: Any, held_out: HeldOut, process: Process, *, num_samples: int
) -> Scores:
    """Answer the first ``num_samples`` questions greedily. Collective.

    ``model`` has ``generate`` (a student, a PEFT model, DeepSpeed's engine). Returns
    ``accuracy_generated`` (None if no word is visual) and ``num_words_generated``, the same on all
    ranks.
    """
    few = replace(held_out, records=held_out.records[:num_samples])
    dataset = SampleDataset(few.records, few.encoder, few.indexed)
    encoded = [dataset.encode(i) for i in range(len(dataset))]
    has_images = [bool(s.is_placeholder_S[: prompt_length(s)].any()) for s in encoded]
    num_right = num_words = 0
    with dense_inference(model):
        for numbers, is_counted in share_of_process(has_images, process, few.batch_size):
            samples = [dataset[i] for i in numbers]
            for number, sample, text in zip(
                numbers, samples, _answers(model, few, samples, process)
            ):
                turns = few.records[number].turns
                right, words = match_gold_words(turns, sample.encoded, text)
                num_right += right * is_counted
                num_words += words * is_counted
    num_right, num_words = sum_over([num_right, num_words], process.group, process.device)
    return {
        "accuracy_generated": ratio(num_right, num_words),
        "num_words_generated": num_words,
    }


def match_gold_words(turns: Sequence[Turn], sample: EncodedSample, text: str) -> tuple[int, int]:
    """Count the visual words of the sample's last answer that ``text`` has in place, and all.

    If the answer is cut off, only the words before the cut count.
    """
    number = _last_turn(sample)
    turn = turns[number]
    words = [word for word, _ in counted_words(turn, number, sample)]
    is_found = _in_common([turn.answer[w.start : w.end] for w in words], text.split())
    found = [is_found[i] for i, word in enumerate(words) if word.is_visual]
    return sum(found), len(found)


def _in_common(wanted: Sequence[str], given: Sequence[str]) -> list[bool]:
    """Mark the wanted words that are part of a longest common subsequence."""
    length = [[0] * (len(given) + 1) for _ in range(len(wanted) + 1)]
    for i in reversed(range(len(wanted))):
        for j in reversed(range(len(given))):
            without = max(length[i + 1][j], length[i][j + 1])
            length[i][j] = 1 + length[i + 1][j + 1] if wanted[i] == given[j] else without
    is_found, i, j = [False] * len(wanted), 0, 0
    while i < len(wanted) and j < len(given):
        if wanted[i] == given[j]:
            is_found[i] = True
            i, j = i + 1, j + 1
        elif length[i][j + 1] == length[i][j]:
            j += 1
        else:
            i += 1
    return is_found


def _answers(
    model: Any, held_out: HeldOut, samples: list[LoadedSample], process: Process
) -> list[str]:
    prompts = [prompt_length(sample.encoded) for sample in samples]
    rests = [len(sample.encoded) - length for sample, length in zip(samples, prompts)]
    inputs = _left_padded(held_out, samples, prompts)
    ids_BT = model.generate(
        **{name: x.to(process.device) for name, x in inputs.items()},
        do_sample=False,
        max_new_tokens=max(rests) + _SPARE_TOKENS,
        eos_token_id=held_out.tokenizer.eos_token_id,
        pad_token_id=held_out.pad_id,
        # Under ZeRO-3 a rank whose answers are done must go on gathering weights with the others.
        synced_gpus=process.world_size > 1,
    )
    new_BT = ids_BT[:, max(prompts) :]
    return held_out.tokenizer.batch_decode(new_BT, skip_special_tokens=True)


def prompt_length(sample: EncodedSample) -> int:
    """Return the number of tokens before the first one of the last answer."""
    last = _last_turn(sample)
    first = next(n for n, (turn, _, _) in enumerate(sample.char_spans) if turn == last)
    return int((sample.labels_S >= 0).nonzero()[first, 0]) + 1


def _last_turn(sample: EncodedSample) -> int:
    """Return the number of the last turn with an answer token before the cut."""
    return sample.char_spans[-1][0]


def _images_of(held_out: HeldOut, sample: LoadedSample, length: int) -> list[Image.Image]:
    """Return the images that stand in the first ``length`` tokens."""
    if held_out.vision is None:
        return list(sample.images)
    num_placeholders = int(sample.encoded.is_placeholder_S[:length].sum())
    ends = accumulate(held_out.vision.num_tokens(image.size) for image in sample.images)
    return [image for image, end in zip(sample.images, ends) if end <= num_placeholders]


def _left_padded(
    held_out: HeldOut, samples: list[LoadedSample], prompts: list[int]
) -> dict[str, Tensor]:
    """Return inputs of ``generate``: rows end together, with masked padding before them."""
    shape = (len(samples), max(prompts))
    ids_BT = torch.full(shape, held_out.pad_id)
    mask_BT = torch.zeros(shape, dtype=torch.int64)
    is_image_BT = torch.zeros(shape, dtype=torch.bool)
    for row, (sample, length) in enumerate(zip(samples, prompts)):
        ids_BT[row, -length:] = sample.encoded.input_ids_S[:length]
        mask_BT[row, -length:] = 1
        is_image_BT[row, -length:] = sample.encoded.is_placeholder_S[:length]
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
    images = [
        image
        for sample, length in zip(samples, prompts)
        for image in _images_of(held_out, sample, length)
    ]
    if held_out.vision is not None:
        inputs |= held_out.vision.extra_inputs(ids_BT, is_image_BT)
        inputs |= held_out.vision.pixels(images) if images else {}
    return inputs
