"""The teacher's losses on disk: what is read is what was written, and damage is found."""

import math
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regate_ds.stores.answer_index import AnswerIndex
from regate_ds.stores.image_orders.reader import ImageOrderStore
from regate_ds.stores.reference.lifecycle import begin_store
from regate_ds.stores.reference.reader import ReferenceStore
from regate_ds.stores.reference.shard import LARGEST
from regate_ds.stores.reference.writer import ReferenceWriter
from regate_ds.stores.shard_job import await_store, missing_in
from tests.support.samples import Sample, make_index

NUM_SAMPLES = 8
SHARD_ROWS = [[5, 0, 7], [2], [1, 6, 3, 4]]


@pytest.fixture
def losses() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 8 * torch.rand(make_index(NUM_SAMPLES).num_tokens, generator=generator)


def _of_shard(losses_N: torch.Tensor, number: int) -> torch.Tensor:
    index = make_index(NUM_SAMPLES)
    return losses_N[index.locate([index.keys[row] for row in SHARD_ROWS[number]])]


def _begin(
    path: Path,
    teacher_id: str = "teacher",
    index: AnswerIndex | None = None,
    rows: list[list[int]] = SHARD_ROWS,
    tokens_per_batch: int = 64,
) -> ReferenceWriter:
    index = make_index(NUM_SAMPLES) if index is None else index
    cut = [torch.tensor(each, dtype=torch.int64) for each in rows]
    begin_store(path, index, teacher_id, lambda _: cut, tokens_per_batch)
    return ReferenceWriter(path, index)


def _file(store: Path, name: str) -> Path:
    return next(store.glob(name))


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


def _stored(path: Path, values_N: torch.Tensor) -> torch.Tensor:
    """The values after they were written and read, as those of one sample."""
    labels = torch.zeros(len(values_N), dtype=torch.int64)
    nothing = torch.zeros(len(values_N), dtype=torch.bool)
    sample = Sample(("set", 0), torch.ones_like(labels), labels, nothing)
    writer = _begin(path, index=AnswerIndex.build([sample]), rows=[[0]])
    writer.write_shard(0, values_N)
    writer.finish()
    return ReferenceStore(path).read([("set", 0)])


def test_storing_costs_at_most_the_documented_error(tmp_path):
    normal = torch.logspace(-14, math.log2(LARGEST), 10001, base=2, dtype=torch.float64).float()
    small = torch.linspace(0, 2**-14, 10001)
    values = torch.cat([normal.clamp(max=LARGEST), small, torch.tensor([LARGEST, 2**-24, 0.0])])
    error = (_stored(tmp_path, values) - values).abs()
    assert float((error / values)[values >= 2**-14].max()) <= 2**-11
    assert float(error[values < 2**-14].max()) <= 2**-25
    assert error[-3:].tolist() == [0, 0, 0]


def test_every_number_of_the_format_is_stored_as_it_is(tmp_path):
    numbers = torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    assert torch.equal(_stored(tmp_path, numbers), numbers)


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


def test_a_store_of_another_kind_is_told_as_one(store):
    with pytest.raises(ValueError, match=r"is a store of another kind, not a store of image ord"):
        ImageOrderStore(store)


@pytest.mark.parametrize("name", ["shard-00001.fp16", "index-*.npz", "rows-*.npy"])
def test_a_missing_file_is_named(store, name):
    path = _file(store, name)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path} is missing"):
        ReferenceStore(store)


def _flips(store: Path, every: int = 1):
    """Every file of the store with ``every`` n-th byte changed in turn; whole again at the end."""
    for path in sorted(store.iterdir()):
        content = path.read_bytes()
        for position in range(0, len(content), every):
            flipped = bytearray(content)
            flipped[position] ^= 1 << position % 8
            path.write_bytes(flipped)
            yield path, position, len(content)
        path.write_bytes(content)


def test_any_flipped_byte_of_any_file_is_found(store):
    num_flips = 0
    for path, _, _ in _flips(store):
        with pytest.raises(ValueError, match=rf"{path} is damaged"):
            ReferenceStore(store, verify="full")
        num_flips += 1
    assert num_flips == sum(path.stat().st_size for path in store.iterdir())
    ReferenceStore(store, verify="full")


def test_a_quick_opening_finds_all_but_wrong_values_and_reading_finds_these(store):
    keys = make_index(NUM_SAMPLES).keys
    for path, position, size in _flips(store, every=5):
        is_value = path.suffix == ".fp16" and position < size - 32
        if not is_value:
            with pytest.raises(ValueError, match=rf"{path} is damaged"):
                ReferenceStore(store)
            continue
        opened = ReferenceStore(store)
        number = int(path.stem[-5:])
        with pytest.raises(ValueError, match=rf"{path} is damaged"):
            opened.read([keys[SHARD_ROWS[number][0]]])
        opened.read([keys[SHARD_ROWS[number - 1][0]]])


def test_a_truncated_shard_is_named_with_its_sizes(store):
    path = store / "shard-00002.fp16"
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    sizes = rf"it has {len(content) - 5} bytes instead of {len(content)}"
    with pytest.raises(ValueError, match=rf"shard-00002\.fp16 is damaged: {sizes}"):
        ReferenceStore(store)


def _begin_one(path: Path) -> ReferenceWriter:
    return _begin(path, index=make_index(1), rows=[[0]])


def test_a_shard_of_an_earlier_time_is_found(tmp_path):
    writer = _begin_one(tmp_path)
    writer.write_shard(0, torch.tensor([1.0]))
    other = (tmp_path / "shard-00000.fp16").read_bytes()
    (tmp_path / "shard-00000.fp16").unlink()
    writer.write_shard(0, torch.tensor([2.0]))
    writer.finish()
    (tmp_path / "shard-00000.fp16").write_bytes(other)
    with pytest.raises(ValueError, match=r"shard-00000\.fp16 is damaged"):
        ReferenceStore(tmp_path)


@pytest.mark.parametrize("of", ["another teacher", "other batches", "other samples"])
def test_a_shard_of_another_job_does_not_fit_though_it_is_as_long(tmp_path, of):
    index = make_index(NUM_SAMPLES)
    same_length = replace(index, digests=index.digests + (of == "other samples"))
    other = _begin(
        tmp_path / "other",
        "another" if of == "another teacher" else "teacher",
        index=same_length,
        tokens_per_batch=32 if of == "other batches" else 64,
    )
    other.write_shard(1, _of_shard(torch.ones(index.num_tokens), 1))
    writer = _begin(tmp_path / "store")
    shutil.copy(tmp_path / "other" / "shard-00001.fp16", tmp_path / "store")
    with pytest.raises(ValueError, match=r"shard-00001\.fp16 is damaged: its values are not"):
        writer.files[1].check()


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


def test_a_wrong_number_of_values_is_refused(tmp_path):
    expected = make_index(NUM_SAMPLES).num_labels[2]
    with pytest.raises(ValueError, match=rf"holds {expected} values, got \(3,\)"):
        _begin(tmp_path).write_shard(1, torch.zeros(3))


def test_a_store_of_other_data_is_not_continued(store):
    own, other = make_index(NUM_SAMPLES).fingerprint, make_index(3).fingerprint
    with pytest.raises(ValueError, match=rf"fingerprint {own}, this job has {other}; samples may"):
        _begin(store, index=make_index(3), rows=[[0, 1, 2]])


def test_a_store_of_another_teacher_is_not_continued(store):
    with pytest.raises(ValueError, match="teacher teacher, this job has student"):
        _begin(store, teacher_id="student")


def test_an_unfinished_store_is_gone_on_with_in_its_own_shards(tmp_path, losses):
    _begin(tmp_path).write_shard(1, _of_shard(losses, 1))
    writer = _begin(tmp_path, rows=[[row] for row in range(NUM_SAMPLES)])
    assert [writer.rows(number).tolist() for number in range(3)] == SHARD_ROWS
    assert missing_in(writer) == [0, 2]


def test_an_unfinished_store_with_other_batches_is_not_gone_on_with(tmp_path):
    _begin(tmp_path)
    with pytest.raises(ValueError, match="begun with teacher.tokens_per_batch=64, this job has 32"):
        _begin(tmp_path, tokens_per_batch=32)


@pytest.mark.parametrize("shards", [[[0, 1]], [[0, 1], [1, 2]], [[0, 1, 2, 3]]])
def test_shards_that_do_not_hold_each_sample_once_are_refused(tmp_path, shards):
    with pytest.raises(ValueError, match="each of the 3 samples of the index exactly once"):
        _begin(tmp_path, index=make_index(3), rows=shards)


def test_a_resumed_job_can_check_what_is_there(tmp_path, losses):
    writer = _begin(tmp_path)
    writer.write_shard(0, _of_shard(losses, 0))
    path = tmp_path / "shard-00000.fp16"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(ValueError, match=r"shard-00000\.fp16 is damaged"):
        _begin(tmp_path).files[0].check()


def test_finishing_without_a_shard_names_it(tmp_path, losses):
    writer = _begin(tmp_path)
    writer.write_shard(0, _of_shard(losses, 0))
    with pytest.raises(ValueError, match=r"shard-00001\.fp16 is missing"):
        writer.finish()


def test_a_store_that_another_machine_has_begun_is_waited_for(tmp_path):
    path = tmp_path / "later" / "store"
    other = threading.Timer(0.3, _begin, args=(path,))
    other.start()
    await_store(path, seconds=20)
    assert missing_in(ReferenceWriter(path, make_index(NUM_SAMPLES))) == [0, 1, 2]
    other.join()


def test_a_folder_that_is_not_shared_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=f"{tmp_path} was made ready by the first rank, but "):
        await_store(tmp_path, seconds=0.2)
