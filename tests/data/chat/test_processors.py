"""Samples equal those of the processor's own call, for random conversations."""

from __future__ import annotations

import pickle
from random import Random
from typing import Any
from unicodedata import combining, normalize

import pytest
import torch
from torch import Tensor

from regate_ds.algorithm.batch import IGNORE
from regate_ds.data.chat.encode import ChatEncoder
from regate_ds.data.chat.vision import ProcessorVision
from regate_ds.data.llava.records import Record
from regate_ds.recipe.students.processor import chat_encoder
from tests.support.chat_templates import MARKED
from tests.support.conversations import pictures_of, random_record, said
from tests.support.processors import MAKERS, can_make, processor

NUM_RECORDS = 12

each_processor = pytest.mark.parametrize("name", [name for name in MAKERS if can_make(name)])


def encoder_of(name: str) -> ChatEncoder:
    return chat_encoder(processor(name), MAKERS[name][2], max_length=100_000)


def records_of(name: str, num_images: int | None = None) -> list[Record]:
    random = Random(name)
    return [random_record(random, n, num_images=num_images) for n in range(NUM_RECORDS)]


def own_call(name: str, records: list[Record]) -> Any:
    """Call the processor itself, by the template with its markers."""
    own = processor(name)
    return own.apply_chat_template(
        [said(record) for record in records],
        chat_template=MARKED[MAKERS[name][1]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": "right"},
    )


def wanted_labels(record: Record, ids_S: Tensor, mask_S: Tensor) -> Tensor:
    """Return the next token of each position where the mask has it, turn by turn."""
    labels_S = torch.full_like(ids_S, IGNORE)
    turn = -1
    for t in range(len(ids_S)):
        turn += int(mask_S[t]) and (t == 0 or not int(mask_S[t - 1]))
        if int(mask_S[t]) and record.turns[turn].learn:
            labels_S[t - 1] = ids_S[t]
    assert turn == len(record.turns) - 1
    return labels_S


@each_processor
def test_a_sample_is_that_of_the_processors_own_call(name: str):
    encoder, vision = encoder_of(name), ProcessorVision(processor(name), MAKERS[name][2])
    records = records_of(name)
    samples = list(encoder.encode_all(records))
    for record, sample in zip(records, samples, strict=True):
        own = dict(own_call(name, [record]))
        ids_S = own.pop("input_ids")[0]
        assert torch.equal(sample.input_ids_S, ids_S)
        mask_S = torch.as_tensor(own.pop("assistant_masks"))[0]
        assert torch.equal(sample.labels_S, wanted_labels(record, ids_S, mask_S))
        assert bool(own.pop("attention_mask").all())
        inputs = vision.extra_inputs(sample.input_ids_S[None], sample.is_placeholder_S[None])
        if record.images:
            inputs |= vision.sample_pixels([pictures_of(record)])
        assert inputs.keys() == own.keys()
        for key, value in own.items():
            assert torch.equal(inputs[key], value), key


@each_processor
def test_image_positions_are_the_patches_of_each_image(name: str):
    vision, patch = ProcessorVision(processor(name), MAKERS[name][2]), MAKERS[name][2]
    patch_id = processor(name).tokenizer.convert_tokens_to_ids(patch)
    for record in records_of(name, num_images=1):
        sample = encoder_of(name).encode(record)
        (picture,) = pictures_of(record)
        is_patch_S = sample.input_ids_S == patch_id
        assert torch.equal(sample.image_S, is_patch_S.long() - 1)
        assert int(is_patch_S.sum()) == vision.num_tokens(picture.size) > 0
        rows, columns = vision.grid(picture.size)
        assert rows * columns == vision.num_tokens(picture.size)
    record = random_record(Random(1), num_images=3)
    image_S = encoder_of(name).encode(record).image_S
    numbers = image_S[image_S >= 0]
    assert sorted(set(numbers.tolist())) == [0, 1, 2]
    assert torch.equal(numbers, numbers.sort().values)


@each_processor
def test_a_micro_batch_has_the_inputs_of_the_processors_own_call(name: str):
    vision, random = ProcessorVision(processor(name), MAKERS[name][2]), Random(f"{name} batch")
    records = [random_record(random, n, num_images=n) for n in (2, 1, 3)]
    own = dict(own_call(name, records))
    ids_BT = own.pop("input_ids")
    inputs = vision.sample_pixels([pictures_of(record) for record in records])
    inputs |= vision.extra_inputs(ids_BT, ids_BT < 0)
    for key in ("attention_mask", "assistant_masks"):
        own.pop(key)
    assert inputs.keys() == own.keys()
    for key, value in own.items():
        assert isinstance(inputs[key], Tensor), key
        assert torch.equal(inputs[key], value), key


@each_processor
def test_a_prompt_is_what_inference_reads_before_it_answers(name: str):
    encoder, own = encoder_of(name), processor(name)
    for record in records_of(name):
        sample = encoder.encode(record)
        messages = said(record)
        for turn in range(len(record.turns)):
            first = len(messages) - 2 * len(record.turns)
            asked = own.apply_chat_template(
                messages[: first + 2 * turn + 1],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            ids_S, image_S = encoder.prompt(record, sample, turn)
            assert torch.equal(ids_S, asked["input_ids"][0])
            assert torch.equal(image_S >= 0, ids_S == encoder.settings()["ids"][0])


@each_processor
def test_each_label_has_its_characters(name: str):
    encoder, tokens = encoder_of(name), processor(name).tokenizer
    for record in records_of(name):
        sample = encoder.encode(record)
        labels = sample.labels_S[sample.labels_S != IGNORE].tolist()
        assert len(labels) == len(sample.char_spans)
        for number, turn in enumerate(record.turns):
            of_turn = [
                (label, start, end)
                for label, (of, start, end) in zip(labels, sample.char_spans)
                if of == number
            ]
            assert bool(of_turn) == turn.learn
            if not of_turn:
                continue
            *text, last = of_turn
            assert last == (encoder.end_ids[0], len(turn.answer), len(turn.answer))
            covered = {i for _, start, end in text for i in range(start, end)}
            bare = turn.answer.strip()
            lead = turn.answer.index(bare)
            # A tokenizer that composes what it reads leaves accents out of its places.
            assert {lead + i for i, char in enumerate(bare) if not combining(char)} <= covered
            told = tokens.decode([label for label, _, _ in text])
            assert normalize("NFC", bare) in normalize("NFC", told)


@each_processor
def test_an_encoder_survives_the_way_to_a_worker(name: str):
    record = records_of(name)[0]
    copy = pickle.loads(pickle.dumps(encoder_of(name)))
    assert torch.equal(copy.encode(record).input_ids_S, encoder_of(name).encode(record).input_ids_S)
    assert copy.settings() == encoder_of(name).settings()
