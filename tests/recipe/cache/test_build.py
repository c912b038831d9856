"""The cached data set against the one that is read and encoded in memory, record by record."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from regate_ds.data.llava.encode import Encoder
from regate_ds.data.llava.records import Record, SampleError, Turn
from regate_ds.data.llava.template import Template
from regate_ds.recipe.cache import build as build_module
from regate_ds.recipe.cache.build import build
from regate_ds.recipe.cache.entry import DataSet, open_data
from regate_ds.recipe.cache.source import Source
from regate_ds.recipe.tasks.pretraining.tokenizer import train_tokenizer
from tests.recipe.cache.cache_helper import BAD, GOOD, contents, in_memory, source, write


def mixed(num: int) -> list:
    drawn = random.Random(0)
    return [drawn.choice(GOOD if drawn.random() < 0.7 else BAD) for _ in range(num)]


def assert_as_in_memory(found: DataSet, of: Source) -> None:
    records, bad, index = in_memory(of)
    assert list(found.records) == records
    assert found.bad == bad
    assert found.index.to_bytes() == index.to_bytes()
    assert found.index.fingerprint == index.fingerprint


@pytest.mark.parametrize("part", [1, 3, 1000])
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_cached_data_set_is_the_one_in_memory(tmp_path, monkeypatch, name, part):
    monkeypatch.setattr(build_module, "PART", part)
    of = source(write(tmp_path, [*GOOD, *BAD, *mixed(20)], name))
    found = open_data(of, [tmp_path / "cache"])
    assert found.bad[0].cause.startswith("turn 1 is an empty answer")
    assert_as_in_memory(found, of)
    assert_as_in_memory(open_data(of, [tmp_path / "cache"]), of)


ONE, TWO = (json.dumps(record, ensure_ascii=False) for record in GOOD[:2])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data.json", f"\ufeff[{ONE}, {TWO}]"),
        ("data.jsonl", f"\ufeff{ONE}\r\n\n \n{TWO}"),
        ("data.jsonl", f"{ONE}\nno json\n\n{TWO[:-1]}\n{TWO}\n"),
    ],
)
def test_other_forms_of_a_file_are_read_alike(tmp_path, name, text):
    path = write(tmp_path, [], name)
    path.write_bytes(text.encode())
    of = source(path)
    assert_as_in_memory(open_data(of, [tmp_path / "cache"]), of)


def test_a_file_without_a_usable_record_is_indexed_too(tmp_path):
    of = source(write(tmp_path, BAD))
    found = open_data(of, [tmp_path / "cache"])
    assert (len(found.records), len(found.bad)) == (0, len(BAD))
    assert_as_in_memory(found, of)


def test_three_workers_write_the_bytes_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "PART", 7)
    of = source(write(tmp_path, mixed(100)))
    for name, num_workers in (("one", 1), ("three", 3)):
        (tmp_path / name).mkdir()
        build(of, tmp_path / name, num_workers=num_workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_the_places_of_images_are_those_of_their_samples(tmp_path):
    found = open_data(source(write(tmp_path, GOOD)), [tmp_path / "cache"])
    assert found.first_image.tolist() == [0, 0, 1, 3, 3, 3]
    assert found.image_sizes.tolist() == [[4, 3], [4, 3], [7, 3]]
    columns = [found.image_sizes, found.first_image, found.index.keys.record_numbers]
    assert all(isinstance(column, np.memmap) for column in columns)


def test_texts_that_are_tokenised_together_give_the_tokens_of_each_alone():
    drawn = random.Random(1)
    words = ["cat", "Größe", "the", "\U0001f600", "it's", "A1", "  two", "new\nline", "."]
    texts = [" ".join(drawn.choices(words, k=drawn.randint(1, 9))) for _ in range(60)]
    encoder = Encoder(
        train_tokenizer(texts, vocab_size=300),
        image_token="<image>",
        num_image_tokens=len,
        max_length=90,
        template=Template(system="S", separator="\n"),
    )
    records = []
    for number in range(40):
        turns = tuple(Turn(*drawn.choices(texts, k=2)) for _ in range(1 + number % 3))
        records.append(Record(("set", number), None, (), (), turns, Path("data.json")))
    cut = 0
    for record, sample in zip(records, encoder.encode_all(records), strict=True):
        assert not isinstance(sample, SampleError)
        alone = encoder.encode(record)
        assert torch.equal(sample.input_ids_S, alone.input_ids_S)
        assert torch.equal(sample.labels_S, alone.labels_S)
        assert (sample.key, sample.char_spans) == (alone.key, ())
        cut += encoder.is_cut(alone)
    assert cut
