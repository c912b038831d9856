"""The orders of image tokens on disk: what is read is what was written, and damage is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regate_ds.algorithm.rankings.attention import AttentionOrder
from regate_ds.algorithm.rankings.diversity import DiversityOrder
from regate_ds.stores.image_orders.manifest import OrdersSubject
from regate_ds.stores.image_orders.pictures import PictureTable, ShownPicture, num_stored
from regate_ds.stores.image_orders.reader import ImageOrderStore
from regate_ds.stores.image_orders.writer import (
    ImageOrderWriter,
    begin_orders,
    is_complete_orders,
)

SIZES = [9, 4, 1, 7, 65535]


def image(number: int):
    return ("set", 10 + number // 2), number % 2


SHOWN = [ShownPicture(size, (image(i), *[image(20)] * (i == 1))) for i, size in enumerate(SIZES)]
TABLE = PictureTable.of(SHOWN)
SUBJECT = OrdersSubject(fingerprint="abc", ranking="diversity", model_id="tower-1", table=TABLE)
SHARDS = [2, 1, 2]


def order_of(picture: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(picture)
    size = SIZES[picture]
    return torch.randperm(size, generator=generator)[: num_stored(size)]


def begin(path: Path, subject: OrdersSubject = SUBJECT, batch: int = 4) -> ImageOrderWriter:
    begin_orders(path, subject, batch, SHARDS)
    return ImageOrderWriter(path)


def write(writer: ImageOrderWriter, number: int) -> None:
    writer.write_shard(number, [order_of(picture) for picture in writer.pictures(number)])


@pytest.fixture
def store(tmp_path) -> Path:
    path = tmp_path / "store"
    writer = begin(path)
    for number in (2, 0, 1):
        write(writer, number)
    writer.finish()
    return path


def test_an_order_is_its_stored_half_and_then_the_rest_by_index(store):
    opened = ImageOrderStore(store)
    asked = [image(4), image(0), image(2), image(20), image(0), image(3)]
    pictures = [4, 0, 2, 1, 0, 3]
    found = opened.read(asked, [SIZES[picture] for picture in pictures])
    for picture, order in zip(pictures, found, strict=True):
        first = order_of(picture).tolist()
        rest = sorted(set(range(SIZES[picture])) - set(first))
        assert order.dtype == torch.int64
        assert order.tolist() == first + rest
    assert opened.read([], []) == []
    assert (opened.num_pictures, opened.num_images) == (5, 6)
    assert (opened.fingerprint, opened.ranking, opened.model_id) == ("abc", "diversity", "tower-1")


def test_an_image_of_another_size_is_refused_by_name(store):
    with pytest.raises(ValueError, match=r"^image 1 of sample 'set' record 10 has 5 .* but 4 in"):
        ImageOrderStore(store).read([image(1)], [5])


def test_an_image_that_the_store_lacks_is_refused_by_name(store):
    with pytest.raises(ValueError, match=r"^image 1 of sample 'set' record 15 is not among the 6"):
        ImageOrderStore(store).read([image(11)], [4])


@pytest.mark.parametrize("size", [0, 65536])
def test_an_image_with_more_tokens_than_uint16_counts_is_refused_by_name(size):
    with pytest.raises(ValueError, match=rf"^image 1 of sample 'set' record 11 has {size} tokens"):
        PictureTable.of((ShownPicture(4, (image(0),)), ShownPicture(size, (image(3),))))


def test_an_image_with_two_pictures_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^image 0 of sample 'set' record 10 is given twice"):
        PictureTable.of((ShownPicture(4, (image(0),)), ShownPicture(4, (image(1), image(0)))))


def test_the_data_and_the_ranking_must_be_those_of_the_store(store):
    opened = ImageOrderStore(store)
    opened.require("abc")
    opened.require_ranking(DiversityOrder())
    with pytest.raises(ValueError, match="belong to data with fingerprint abc, this run's data ha"):
        opened.require("abd")
    with pytest.raises(ValueError, match=r"ranking diversity, this run has attention contribution"):
        opened.require_ranking(AttentionOrder())


def test_a_flipped_bit_anywhere_is_found(store):
    """On opening, or at the latest when an order of its shard is read; never is one returned."""
    sizes = {name: (store / name).stat().st_size for name in names(store)}
    for name, size in sizes.items():
        path, content = store / name, (store / name).read_bytes()
        for place in sorted({0, size // 3, size // 2, size - 33, size - 1} & set(range(size))):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"{path}"):
                ImageOrderStore(store, verify="full")
            with pytest.raises(ValueError, match=rf"{path}"):
                ImageOrderStore(store).read([image(i) for i in range(5)], SIZES)
        path.write_bytes(content)
    ImageOrderStore(store, verify="full")


def names(store: Path) -> list[str]:
    return sorted(path.name for path in store.iterdir())


def test_a_shard_that_is_not_read_is_not_in_the_way(store):
    path = store / "shard-00002.u16"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    opened = ImageOrderStore(store)
    assert opened.read([image(0)], [9])[0][: num_stored(9)].tolist() == order_of(0).tolist()
    with pytest.raises(ValueError, match=rf"{path} is damaged: its values are not"):
        opened.read([image(3)], [7])


def test_a_shard_of_another_job_does_not_fit_though_it_is_as_long(store, tmp_path):
    others = {
        "ranking": replace(SUBJECT, ranking="attention"),
        "model": replace(SUBJECT, model_id="tower-2"),
        "images": replace(
            SUBJECT, table=PictureTable.of((ShownPicture(9, (image(30),)), *SHOWN[1:]))
        ),
    }
    for name, subject in others.items():
        path = tmp_path / name
        writer = begin(path, subject)
        (path / "shard-00000.u16").write_bytes((store / "shard-00000.u16").read_bytes())
        with pytest.raises(ValueError, match=r"shard-00000\.u16 is damaged"):
            writer.files[0].check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "abd"}, "belongs to data with fingerprint abc, this job has abd"),
        ({"ranking": "pixels"}, "belongs to the ranking diversity, this job has pixels"),
        ({"model_id": None}, "belongs to the model tower-1, this job has None"),
        ({"table": PictureTable.of(SHOWN[:-1])}, "belongs to pictures with hash"),
    ],
)
def test_a_folder_of_another_job_is_refused(store, change, message):
    other = replace(SUBJECT, **change)
    with pytest.raises(ValueError, match=message):
        is_complete_orders(store, other)
    with pytest.raises(ValueError, match=message):
        begin(store, other)


def test_a_store_that_lacks_a_shard_is_gone_on_with(store):
    before = {name: (store / name).read_bytes() for name in names(store)}
    assert is_complete_orders(store, SUBJECT)
    (store / "shard-00001.u16").unlink()
    assert not is_complete_orders(store, SUBJECT)
    with pytest.raises(ValueError, match=r"begun with rank\.batch=4, this job has 5; use"):
        begin(store, batch=5)
    writer = begin(store)
    with pytest.raises(ValueError, match=r"is not finished \(1 of 3 shards are still to compute\)"):
        ImageOrderStore(store)
    write(writer, 1)
    writer.finish()
    assert {name: (store / name).read_bytes() for name in names(store)} == before


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 2, 3, 3], [0, 1, 2, 3, 9], [-1, 0, 1, 2, 3]])
def test_what_is_no_order_is_refused_naming_the_image(tmp_path, order):
    writer = begin(tmp_path / "store")
    with pytest.raises(ValueError, match=r"^image 0 of sample 'set' record 10: the ranking gave"):
        writer.write_shard(0, [torch.tensor(order), order_of(1)])


def test_another_folder_is_no_store(tmp_path):
    with pytest.raises(ValueError, match=r"is not a store of image orders .*\(regate rank"):
        ImageOrderStore(tmp_path)
