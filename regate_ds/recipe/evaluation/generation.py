"""Count the words that need the image and that the model gets right when it answers freely.

The model answers the last turn of a sample (as cut by `data.max_length`) greedily, given the turns
before it. The generated words are aligned with the true answer's by their longest common
subsequence; a gold word is right if it is part of it.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regate_ds.data.collate import LoadedSample, SampleDataset
from regate_ds.data.llava.records import Record, Turn
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
            asked = [few.records[number] for number in numbers]
            answers = _answers(model, few, asked, samples, process)
            for record, sample, text in zip(asked, samples, answers):
                right, words = match_gold_words(record.turns, sample.encoded, text)
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
    model: Any,
    held_out: HeldOut,
    records: list[Record],
    samples: list[LoadedSample],
    process: Process,
) -> list[str]:
    encoded = [sample.encoded for sample in samples]
    prompts = [
        held_out.encoder.prompt(record, sample, _last_turn(sample))
        for record, sample in zip(records, encoded)
    ]
    rests = [len(sample) - prompt_length(sample) for sample in encoded]
    inputs = _left_padded(held_out, samples, prompts)
    ids_BT = model.generate(
        **{name: x.to(process.device) for name, x in inputs.items()},
        do_sample=False,
        max_new_tokens=max(rests) + _SPARE_TOKENS,
        eos_token_id=held_out.encoder.end_ids,
        pad_token_id=held_out.pad_id,
        # Under ZeRO-3 a rank whose answers are done must go on gathering weights with the others.
        synced_gpus=process.world_size > 1,
    )
    new_BT = ids_BT[:, inputs["input_ids"].shape[1] :]
    return held_out.tokenizer.batch_decode(new_BT, skip_special_tokens=True)


def prompt_length(sample: EncodedSample) -> int:
    """Return the number of tokens before the first one of the last answer."""
    return sample.answer_start(_last_turn(sample))


def _last_turn(sample: EncodedSample) -> int:
    """Return the number of the last turn with an answer token before the cut."""
    return sample.char_spans[-1][0]


def _left_padded(
    held_out: HeldOut, samples: list[LoadedSample], prompts: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Return inputs of ``generate``: rows end together, with masked padding before them."""
    shape = (len(samples), max(len(ids_S) for ids_S, _ in prompts))
    ids_BT = torch.full(shape, held_out.pad_id)
    mask_BT = torch.zeros(shape, dtype=torch.int64)
    is_image_BT = torch.zeros(shape, dtype=torch.bool)
    for row, (ids_S, image_S) in enumerate(prompts):
        ids_BT[row, -len(ids_S) :] = ids_S
        mask_BT[row, -len(ids_S) :] = 1
        is_image_BT[row, -len(ids_S) :] = image_S >= 0
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
    # Images that stand behind the prompt belong to later turns.
    images = [
        list(sample.images[: int(image_S.max()) + 1])
        for sample, (_, image_S) in zip(samples, prompts)
    ]
    if held_out.vision is not None:
        shown = [each for each in images if each]
        inputs |= held_out.vision.extra_inputs(ids_BT, is_image_BT)
        inputs |= held_out.vision.sample_pixels(shown) if shown else {}
    return inputs
