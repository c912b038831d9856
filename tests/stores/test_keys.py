"""Keys in columns, against a tuple and a dict of the same keys."""

import random
import tracemalloc

import numpy as np
import pytest
import torch

from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.stores.index_files import IndexWriter, map_index
from regate_ds.stores.index_part import IndexPart
from regate_ds.stores.keys import UNKNOWN, SampleKeys
from tests.support.samples import make_index, make_samples

ORDERED = [("a", 1), ("a", 4), ("b", 0), ("b", 4), ("b", 2**40)]
UNORDERED = [("b", 4), ("a", 9), ("b", 0), ("a", 1), ("c", 4)]
ONE_NAME = [("set", number) for number in range(0, 60, 3)]


@pytest.mark.parametrize("keys", [ORDERED, UNORDERED, ONE_NAME, []], ids=len)
def test_keys_read_like_a_tuple_and_are_found_like_in_a_dict(keys):
    columns, row_of = SampleKeys.of(keys), {key: row for row, key in enumerate(keys)}
    assert (len(columns), list(columns), columns[1:4]) == (len(keys), keys, tuple(keys[1:4]))
    assert [columns[row] for row in range(len(keys))] == keys
    asked = [(name, n) for name in ("a", "b", "c", "d", "set") for n in (0, 1, 4, 5, 9, 57, 99)]
    random.Random(0).shuffle(asked)
    expected = [row_of.get(key, UNKNOWN) for key in asked]
    assert columns.find(asked).tolist() == expected
    assert columns.find(SampleKeys.of(asked)).tolist() == expected
    assert columns.find([]).tolist() == []
    assert columns.first_twice() is None


@pytest.mark.parametrize("keys", [ORDERED, UNORDERED, ONE_NAME], ids=len)
def test_the_first_row_that_repeats_a_key_is_found_wherever_it_is(keys):
    for repeated in range(len(keys)):
        for place in range(repeated + 1, len(keys) + 1):
            twice = [*keys[:place], keys[repeated], *keys[place:], keys[-1]]
            seen: set = set()
            first = next(r for r, key in enumerate(twice) if key in seen or seen.add(key))
            assert SampleKeys.of(twice).first_twice() == first


def test_joined_parts_are_the_keys_made_at_once():
    keys = [*UNORDERED, *ONE_NAME]
    for cut in range(len(keys) + 1):
        parts = [SampleKeys.of(keys[:cut]), SampleKeys.of(keys[cut:])]
        assert SampleKeys.join(parts) == SampleKeys.of(keys)
    assert SampleKeys.join([]) == SampleKeys.of([])
    assert SampleKeys.of(keys) != SampleKeys.of(keys[1:])


def test_an_index_of_joined_parts_has_the_bytes_of_one_that_is_made_at_once():
    samples = make_samples(9)
    for cuts in ([0, 9], [0, 1, 9], [0, 3, 3, 8, 9]):
        parts = [IndexPart.of(samples[a:b]) for a, b in zip(cuts, cuts[1:])]
        assert AnswerIndex.join(parts).to_bytes() == make_index(9).to_bytes()


def save(folder, parts):
    writer = IndexWriter(folder, "set")
    for part in parts:
        writer.append(part)
    writer.close()


@pytest.mark.parametrize("cuts", [[0, 7], [0, 1, 1, 6, 7], [0, 0], [0]], ids=str)
def test_a_mapped_index_is_the_one_that_was_written_part_by_part(cuts, tmp_path):
    samples, index = make_samples(7), make_index(cuts[-1])
    save(tmp_path, [IndexPart.of(samples[a:b]) for a, b in zip(cuts, cuts[1:])])
    mapped = map_index(tmp_path)
    assert mapped == index
    assert mapped.to_bytes() == index.to_bytes()
    assert torch.equal(mapped.num_labels, index.num_labels)
    assert isinstance(mapped.keys.record_numbers, np.memmap)


def test_a_mapped_file_that_is_cut_off_is_named(tmp_path):
    save(tmp_path, [IndexPart.of(make_samples(7))])
    path = tmp_path / "digests.npy"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=rf"cannot read {path}: .*; delete the folder {tmp_path}"):
        map_index(tmp_path)


def test_a_mapped_index_keeps_nothing_in_memory_for_each_sample(tmp_path):
    num_samples = 200_000
    column = np.arange(num_samples)
    keys = SampleKeys(["set"], np.zeros(num_samples, np.int32), 2 * column)
    save(tmp_path, [IndexPart(keys, column, column, column, bytes(16 * num_samples))])
    tracemalloc.start()
    try:
        index = map_index(tmp_path)
        assert index.rows([("set", 200), ("set", 399_998)]) == [100, 199_999]
        assert index.keys[7] == ("set", 14)
        assert tracemalloc.get_traced_memory()[0] < 0.5 * num_samples
    finally:
        tracemalloc.stop()
