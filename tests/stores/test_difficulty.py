"""Difficulty on one rank, and on disk."""

import math

import pytest
import torch
import torch.distributed as dist

from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.stores.difficulty.indexed import DifficultyStore
from tests.support.samples import make_index
from tests.support.stores import read_difficulty, write_difficulty

NUM_SAMPLES = 9


@pytest.fixture
def index() -> AnswerIndex:
    return make_index(NUM_SAMPLES)


@pytest.fixture
def store(index) -> DifficultyStore:
    """A store in which every value is its own place in the index."""
    store = DifficultyStore(index)
    write_difficulty(store, index.keys, torch.arange(float(index.num_tokens)))
    return store


def test_what_was_never_written_is_zero(index):
    read_N = read_difficulty(DifficultyStore(index), index.keys)
    assert read_N.dtype == torch.float32
    assert torch.equal(read_N, torch.zeros(index.num_tokens))


def test_reads_what_was_written_in_the_order_of_the_keys(index, store):
    for rows in ([4, 0, 8], [3, 3], [], list(range(NUM_SAMPLES))):
        keys = [index.keys[row] for row in rows]
        assert torch.equal(read_difficulty(store, keys), index.locate(keys).float())


def test_a_write_changes_its_samples_only(index, store):
    before = read_difficulty(store, index.keys)
    write_difficulty(
        store, [index.keys[3], index.keys[1]], -torch.ones(len(index.locate(index.keys[1:4:2])))
    )
    written = index.locate([index.keys[1], index.keys[3]])
    after = read_difficulty(store, index.keys)
    assert bool((after[written] == -1).all())
    after[written] = before[written]
    assert torch.equal(after, before)


def test_the_last_write_of_a_sample_in_one_call_wins(index, store):
    keys = [index.keys[2], index.keys[5], index.keys[2]]
    values = [torch.full((len(index.locate([key])),), float(i)) for i, key in enumerate(keys)]
    write_difficulty(store, keys, torch.cat(values))
    assert torch.equal(read_difficulty(store, keys[1:2]), values[1])
    assert torch.equal(read_difficulty(store, keys[2:]), values[2])


def test_a_read_is_a_copy(index, store):
    read_difficulty(store, index.keys[:2]).zero_()
    assert torch.equal(read_difficulty(store, index.keys), torch.arange(float(index.num_tokens)))


def test_a_wrong_number_of_values_is_refused(index, store):
    expected = len(index.locate(index.keys[:2]))
    with pytest.raises(ValueError, match=rf"2 samples have {expected} label positions.*\(1,\)"):
        write_difficulty(store, index.keys[:2], torch.zeros(1))


def test_an_unknown_key_is_named(store):
    with pytest.raises(ValueError, match="'set' record 3 is not in the answer index"):
        read_difficulty(store, [("set", 3)])


def test_without_a_group_nothing_is_sent(index, monkeypatch):
    for name in ("all_reduce", "all_to_all_single", "get_rank", "get_world_size"):
        monkeypatch.delattr(dist, name)
    store = DifficultyStore(index)
    write_difficulty(store, index.keys, torch.ones(index.num_tokens))
    assert float(read_difficulty(store, index.keys).sum()) == index.num_tokens


def test_loading_gives_what_was_saved(index, store, tmp_path):
    store.save(tmp_path / "new" / "folder")
    loaded = DifficultyStore(index)
    loaded.load(tmp_path / "new" / "folder")
    assert torch.equal(read_difficulty(loaded, index.keys), read_difficulty(store, index.keys))


def test_a_store_that_goes_on_saves_what_an_uninterrupted_one_would(index, store, tmp_path):
    store.save(tmp_path / "middle")
    resumed = DifficultyStore(index)
    resumed.load(tmp_path / "middle")
    for each, name in ((store, "one"), (resumed, "two")):
        write_difficulty(each, index.keys[:3], torch.ones(len(index.locate(index.keys[:3]))))
        each.save(tmp_path / name)
    one, two = (tmp_path / name / "difficulty-0-of-1.npz" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_a_folder_without_sidecars_is_one_clear_error(store, tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path} lacks difficulty-\*-of-\*\.npz"):
        store.load(tmp_path)


def test_a_missing_sidecar_is_named(store, tmp_path):
    store.save(tmp_path)
    (tmp_path / "difficulty-0-of-1.npz").rename(tmp_path / "difficulty-1-of-3.npz")
    with pytest.raises(ValueError, match=r"lacks difficulty-0-of-3\.npz, difficulty-2-of-3\.npz"):
        store.load(tmp_path)


def test_other_data_is_refused_naming_both_fingerprints(index, store, tmp_path):
    store.save(tmp_path)
    other = make_index(3)
    names = rf"{index.fingerprint}, this run's data has {other.fingerprint}"
    with pytest.raises(ValueError, match=names):
        DifficultyStore(other).load(tmp_path)


def test_a_damaged_sidecar_is_named_and_changes_nothing(index, store, tmp_path):
    store.save(tmp_path)
    path = tmp_path / "difficulty-0-of-1.npz"
    content = bytearray(path.read_bytes())
    # Behind the member's name and its npy header, which is 128 bytes long.
    in_values = content.find(b"values.npy") + 200
    for damaged in (content[: len(content) // 2], b"", _flipped(content, in_values)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot read the difficulty file .*0-of-1\.npz"):
            store.load(tmp_path)
    assert torch.equal(read_difficulty(store, index.keys), torch.arange(float(index.num_tokens)))


def _flipped(content: bytearray, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def test_sidecars_of_two_saves_are_refused(store, tmp_path):
    store.save(tmp_path)
    (tmp_path / "difficulty-0-of-2.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"several saves \(by \[1, 2\] ranks\)"):
        store.load(tmp_path)


def test_columns_are_kept_apart_and_each_begins_with_its_own_value(index, tmp_path):
    store = DifficultyStore(index, columns={"loss": math.inf, "entropy": 0.0})
    assert bool(store.read(index.keys)["loss"].isinf().all())
    values_N = torch.arange(float(index.num_tokens))
    store.write(index.keys, {"loss": values_N, "entropy": -values_N})
    store.save(tmp_path)
    again = DifficultyStore(index, columns={"loss": math.inf, "entropy": 0.0})
    again.load(tmp_path)
    found = again.read(index.keys)
    assert torch.equal(found["loss"], values_N)
    assert torch.equal(found["entropy"], -values_N)


def test_a_save_with_other_statistics_is_refused(index, store, tmp_path):
    store.save(tmp_path)
    other = DifficultyStore(index, columns={"entropy": 0.0})
    with pytest.raises(ValueError, match=r"has the statistics \['difficulty'\], .* \['entropy'\]"):
        other.load(tmp_path)


def test_a_write_must_name_every_column(index, store):
    with pytest.raises(ValueError, match=r"columns \['difficulty'\], got \['loss'\]"):
        store.write(index.keys, {"loss": torch.zeros(index.num_tokens)})
