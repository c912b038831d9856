"""The teacher's losses on disk: what is read is what was written, and damage is found."""

from pathlib import Path

import pytest
import torch

from regate_ds.data.reference_store import ReferenceStore
from regate_ds.data.reference_writer import LARGEST, ReferenceWriter
from tests.samples import make_index

NUM_SAMPLES = 8
SHARD_ROWS = [[5, 0, 7], [2], [1, 6, 3, 4]]


@pytest.fixture
def losses() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 8 * torch.rand(make_index(NUM_SAMPLES).num_tokens, generator=generator)


def _of_shard(losses_N: torch.Tensor, number: int) -> torch.Tensor:
    index = make_index(NUM_SAMPLES)
    return losses_N[index.locate([index.keys[row] for row in SHARD_ROWS[number]])]


def _begin(path: Path, teacher_id: str = "teacher", num_samples: int = NUM_SAMPLES):
    rows = SHARD_ROWS if num_samples == NUM_SAMPLES else [list(range(num_samples))]
    return ReferenceWriter.create(path, make_index(num_samples), teacher_id, rows)


@pytest.fixture
def store(tmp_path, losses) -> Path:
    path = tmp_path / "store"
    writer = _begin(path)
    for number in (2, 0, 1):
        writer.write_shard(number, _of_shard(losses, number))
    writer.finish()
    return path


def test_reads_the_losses_of_any_samples_in_their_order(store, losses):
    opened, index = ReferenceStore(store), make_index(NUM_SAMPLES)
    for rows in ([3, 5, 0, 3], [7], list(range(NUM_SAMPLES))):
        keys = [index.keys[row] for row in rows]
        read_N = opened.read(keys)
        assert read_N.dtype == torch.float32
        assert torch.equal(read_N, losses[index.locate(keys)].half().float())
    assert opened.read([]).shape == (0,)


def test_fp16_costs_at_most_the_documented_error():
    normal = torch.logspace(-14, 15.9, 10001, base=2)
    small = torch.linspace(0, 2**-14, 10001)
    assert float(((normal.half().float() - normal).abs() / normal).max()) <= 2**-11
    assert float((small.half().float() - small).abs().max()) <= 2**-25


def test_a_finished_store_says_what_it_holds(store):
    opened = ReferenceStore(store)
    assert opened.index == make_index(NUM_SAMPLES)
    assert opened.fingerprint == opened.index.fingerprint
    assert opened.teacher_id == "teacher"
    opened.require(opened.index.fingerprint)


def test_other_data_is_refused_naming_both_fingerprints(store):
    own, other = make_index(NUM_SAMPLES).fingerprint, make_index(3).fingerprint
    with pytest.raises(ValueError, match=rf"fingerprint {own}, this run's data has {other}"):
        ReferenceStore(store).require(other)


def test_an_unknown_key_is_named(store):
    with pytest.raises(ValueError, match="'set' record 77 is not in the answer index"):
        ReferenceStore(store).read([("set", 77)])


def test_a_folder_that_is_not_a_store_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"is not a reference store \(it has no manifest"):
        ReferenceStore(tmp_path)


@pytest.mark.parametrize("name", ["shard-00001.fp16", "index.npz"])
def test_a_missing_file_is_named(store, name):
    (store / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        ReferenceStore(store)


@pytest.mark.parametrize("name", ["shard-00000.fp16", "shard-00002.fp16", "manifest.json"])
def test_any_flipped_byte_is_found(store, name):
    path = store / name
    content = path.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=rf"{name} is damaged"):
            ReferenceStore(store)


def test_a_flipped_byte_in_the_index_is_found(store):
    path = store / "index.npz"
    content = bytearray(path.read_bytes())
    for position in (0, 11, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:position] + b"#" + content[position + 1 :])
        with pytest.raises(ValueError, match=r"index\.npz is damaged"):
            ReferenceStore(store)


def test_a_truncated_shard_is_named_with_its_sizes(store):
    path = store / "shard-00002.fp16"
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    sizes = rf"it has {len(content) - 5} bytes instead of {len(content)}"
    with pytest.raises(ValueError, match=rf"shard-00002\.fp16 is damaged: {sizes}"):
        ReferenceStore(store)


def test_a_shard_of_another_job_is_found(tmp_path):
    writer = ReferenceWriter.create(tmp_path, make_index(1), "teacher", [[0]])
    writer.write_shard(0, torch.tensor([1.0]))
    other = (tmp_path / "shard-00000.fp16").read_bytes()
    (tmp_path / "shard-00000.fp16").unlink()
    writer.write_shard(0, torch.tensor([2.0]))
    writer.finish()
    (tmp_path / "shard-00000.fp16").write_bytes(other)
    with pytest.raises(ValueError, match=r"shard-00000\.fp16 is damaged"):
        ReferenceStore(tmp_path)


def test_an_unfinished_store_is_refused_with_what_is_left(tmp_path, losses):
    _begin(tmp_path).write_shard(1, _of_shard(losses, 1))
    with pytest.raises(ValueError, match=r"not finished \(2 of 3 shards are still to compute\)"):
        ReferenceStore(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2 * LARGEST])
def test_a_loss_that_cannot_be_stored_names_its_sample(tmp_path, losses, bad):
    index = make_index(NUM_SAMPLES)
    losses[index.locate([index.keys[6]])[0]] = bad
    with pytest.raises(ValueError, match=rf"'set' record 16 is {bad} nats"):
        _begin(tmp_path).write_shard(2, _of_shard(losses, 2))
    assert not (tmp_path / "shard-00002.fp16").exists()


def test_the_largest_number_is_stored(tmp_path):
    writer = ReferenceWriter.create(tmp_path, make_index(1), "teacher", [[0]])
    writer.write_shard(0, torch.tensor([LARGEST]))
    writer.finish()
    assert ReferenceStore(tmp_path).read([("set", 10)]).tolist() == [LARGEST]


def test_a_wrong_number_of_values_is_refused(tmp_path):
    expected = make_index(NUM_SAMPLES).num_labels[2]
    with pytest.raises(ValueError, match=rf"holds {expected} values, got \(3,\)"):
        _begin(tmp_path).write_shard(1, torch.zeros(3))


def test_a_store_of_other_data_is_not_continued(store):
    own, other = make_index(NUM_SAMPLES).fingerprint, make_index(3).fingerprint
    with pytest.raises(ValueError, match=rf"fingerprint {own}, this job has {other}"):
        _begin(store, num_samples=3)


def test_a_store_of_another_teacher_is_not_continued(store):
    with pytest.raises(ValueError, match="teacher teacher, this job has student"):
        _begin(store, teacher_id="student")


def test_a_store_with_other_shards_is_not_continued(tmp_path):
    _begin(tmp_path)
    with pytest.raises(ValueError, match="begun with 3 other shards than the 8"):
        ReferenceWriter.create(
            tmp_path, make_index(NUM_SAMPLES), "teacher", [[i] for i in range(NUM_SAMPLES)]
        )


@pytest.mark.parametrize("shards", [[[0, 1]], [[0, 1], [1, 2]], [[0, 1, 2, 3]]])
def test_shards_that_do_not_hold_each_sample_once_are_refused(tmp_path, shards):
    with pytest.raises(ValueError, match="each of the 3 samples of the index exactly once"):
        ReferenceWriter.create(tmp_path, make_index(3), "teacher", shards)


def test_a_damaged_shard_is_not_skipped_by_a_resumed_job(tmp_path, losses):
    writer = _begin(tmp_path)
    writer.write_shard(0, _of_shard(losses, 0))
    path = tmp_path / "shard-00000.fp16"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(ValueError, match=r"shard-00000\.fp16 is damaged"):
        _begin(tmp_path).has_shard(0)


def test_finishing_without_a_shard_names_it(tmp_path, losses):
    writer = _begin(tmp_path)
    writer.write_shard(0, _of_shard(losses, 0))
    with pytest.raises(ValueError, match=r"shard-00001\.fp16 is missing"):
        writer.finish()
