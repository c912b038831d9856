"""Micro-batches: padded and packed rows, images in reading order, lazy decoding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from regate_ds.algorithm.batch import IGNORE
from regate_ds.data.collate import Collator, LoadedSample, SampleDataset, first_fit
from regate_ds.data.llava.encode import Encoder
from regate_ds.data.llava.records import Record, SampleError, Turn
from regate_ds.data.llava.sample import EncodedSample
from regate_ds.data.llava.template import Template

PAD = 0


class Vision:
    """Reports each image by its grey value."""

    def num_tokens(self, size: tuple[int, int]) -> int:
        return 1

    def pixels(self, images: list[Image.Image]) -> dict[str, Tensor]:
        return {"pixel_values": torch.tensor([image.getpixel((0, 0))[0] for image in images])}  # type: ignore[index]

    def sample_pixels(self, samples: list[list[Image.Image]]) -> dict[str, Tensor]:
        return self.pixels([image for images in samples for image in images])

    def extra_inputs(self, input_ids_BT: Tensor, is_placeholder_BT: Tensor) -> dict[str, Tensor]:
        return {"kinds": is_placeholder_BT.long()}


def sample(number: int, length: int, *greys: int) -> LoadedSample:
    """Tokens 10*number+1, ...; the last two positions but one are labels."""
    ids_S = 10 * number + 1 + torch.arange(length)
    labels_S = torch.full((length,), IGNORE)
    labels_S[-3:-1] = ids_S[-2:]
    image_S = torch.where(torch.arange(length) < len(greys), torch.arange(length), -1)
    encoded = EncodedSample(("set", number), ids_S, labels_S, image_S, (), ())
    return LoadedSample(encoded, tuple(Image.new("RGB", (2, 2), (g, g, g)) for g in greys))


def test_a_row_is_a_sample_padded_on_the_right_and_needs_no_mask():
    batch = Collator(pad_id=PAD, vision=None)([sample(1, 3), sample(2, 5)])
    assert set(batch.inputs) == {"input_ids"}
    assert batch.inputs["input_ids"].tolist() == [[11, 12, 13, 0, 0], [21, 22, 23, 24, 25]]
    assert batch.tokens.segment_BT.tolist() == [[0, 0, 0, -1, -1], [0] * 5]
    no = IGNORE
    assert batch.tokens.labels_BT.tolist() == [[12, 13, no, no, no], [no, no, 24, 25, no]]
    assert batch.tokens.keys == ((("set", 1),), (("set", 2),))


def test_packed_rows_hold_samples_first_fit_and_positions_restart():
    samples = [sample(1, 4), sample(2, 5), sample(3, 3)]
    batch = Collator(pad_id=PAD, vision=None, pack_length=8)(samples)
    assert batch.tokens.keys == ((("set", 1), ("set", 3)), (("set", 2),))
    ids = [[11, 12, 13, 14, 31, 32, 33], [21, 22, 23, 24, 25, 0, 0]]
    assert batch.inputs["input_ids"].tolist() == ids
    positions = [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 0, 1]]
    assert batch.inputs["position_ids"].tolist() == positions
    assert batch.tokens.segment_BT.tolist() == [[0] * 4 + [1] * 3, [0] * 5 + [-1] * 2]
    assert batch.tokens.num_labels_per_sample == [2, 2, 2]


def test_images_are_numbered_in_their_sample():
    samples = [sample(1, 4, 9, 9), sample(2, 5), sample(3, 3, 9)]
    batch = Collator(pad_id=PAD, vision=Vision(), pack_length=8)(samples)
    assert batch.tokens.image_BT.tolist() == [[0, 1, -1, -1, 0, -1, -1], [-1] * 7]


def test_packing_changes_nothing_of_a_sample():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 10, (20,), generator=generator).tolist()
    samples = [sample(n, length) for n, length in enumerate(lengths)]
    batch = Collator(pad_id=PAD, vision=None, pack_length=16)(samples)
    assert batch.inputs["input_ids"].shape[1] <= 16
    found = {}
    for b, keys in enumerate(batch.tokens.keys):
        for segment, key in enumerate(keys):
            mine = batch.tokens.segment_BT[b] == segment
            found[key] = (batch.inputs["input_ids"][b, mine], batch.tokens.labels_BT[b, mine])
    assert len(found) == 20
    for one in samples:
        ids, labels = found[one.encoded.key]
        assert torch.equal(ids, one.encoded.input_ids_S)
        assert torch.equal(labels, one.encoded.labels_S)


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([3, 3, 3], [[0, 1], [2]]),
        ([4, 5, 3, 1, 2], [[0, 2], [1, 3], [4]]),
        ([7, 7], [[0], [1]]),
        ([1, 6, 6, 1], [[0, 1], [2, 3]]),
    ],
)
def test_each_length_goes_into_the_first_row_with_room(lengths: list[int], rows: list[list[int]]):
    assert first_fit(lengths, 7) == rows


def test_a_sample_longer_than_a_packed_row_is_refused_by_name():
    collator = Collator(pad_id=PAD, vision=None, pack_length=4)
    with pytest.raises(ValueError, match=r"\('set', 2\) has 5 tokens, a packed row only 4"):
        collator([sample(1, 4), sample(2, 5)])


def test_images_follow_the_reading_order_of_the_rows_not_of_the_samples():
    samples = [sample(1, 4, 10, 11), sample(2, 5, 20), sample(3, 3, 30)]
    padded = Collator(pad_id=PAD, vision=Vision())(samples)
    assert padded.inputs["pixel_values"].tolist() == [10, 11, 20, 30]
    packed = Collator(pad_id=PAD, vision=Vision(), pack_length=8)(samples)
    assert packed.inputs["pixel_values"].tolist() == [10, 11, 30, 20]
    assert packed.inputs["kinds"].tolist() == [[1, 1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0]]


def test_a_micro_batch_without_images_has_no_pixels():
    batch = Collator(pad_id=PAD, vision=Vision())([sample(1, 4), sample(2, 5)])
    assert set(batch.inputs) == {"input_ids", "kinds"}


def test_images_for_a_model_without_a_vision_side_are_refused():
    with pytest.raises(ValueError, match="2 images for a model without a vision tower"):
        Collator(pad_id=PAD, vision=None)([sample(1, 4, 10, 11)])


def test_moving_a_batch_leaves_its_tokens_on_the_host():
    batch = Collator(pad_id=PAD, vision=Vision())([sample(1, 4, 10)])
    moved = batch.to("meta")
    assert {x.device.type for x in moved.inputs.values()} == {"meta"}
    assert moved.tokens is batch.tokens


class WordTokenizer:
    """One token for each character."""

    bos_token_id, eos_token_id = 2, 3

    all_special_tokens: tuple[str, ...] = ()
    added_tokens_decoder: Mapping[int, Any] = MappingProxyType({})

    def get_vocab(self) -> dict[str, int]:
        return {"$": 1}

    def convert_tokens_to_ids(self, token: str) -> int:
        return 1

    def __call__(self, text: str, **_: Any) -> dict[str, list[Any]]:
        return {
            "input_ids": [ord(char) for char in text],
            "offset_mapping": [(i, i + 1) for i in range(len(text))],
        }


def dataset(*images: Path) -> SampleDataset:
    encoder = Encoder(
        WordTokenizer(),
        image_token="$",
        num_image_tokens=lambda size: 1,
        max_length=100,
        template=Template(),
    )
    turns = (Turn("<image>" * len(images), "yes"),)
    per_marker = (1,) * len(images)
    return SampleDataset(
        [Record(("set", 0), None, images, per_marker, turns, Path("data.json"))], encoder
    )


def test_images_are_decoded_to_rgb_when_a_sample_is_asked_for(tmp_path: Path):
    Image.new("L", (2, 2), 7).save(tmp_path / "a.png")
    Image.new("RGBA", (3, 2), (9, 9, 9, 0)).save(tmp_path / "b.png")
    data = dataset(tmp_path / "a.png", tmp_path / "b.png")
    loaded = data[0]
    assert len(data) == 1
    assert [image.mode for image in loaded.images] == ["RGB", "RGB"]
    assert [image.getpixel((0, 0)) for image in loaded.images] == [(7, 7, 7), (255, 255, 255)]
    assert torch.equal(loaded.encoded.input_ids_S, data.encode(0).input_ids_S)


def cut_pixels_off(path: Path) -> None:
    """Leave a header that can be read and pixels that cannot."""
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:-900])


def test_encoding_alone_decodes_no_image(tmp_path: Path):
    cut_pixels_off(tmp_path / "a.png")
    assert dataset(tmp_path / "a.png").encode(0).images == (tmp_path / "a.png",)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_cannot_be_decoded_names_file_and_record(tmp_path: Path, num_workers: int):
    cut_pixels_off(tmp_path / "a.png")
    loader = DataLoader(dataset(tmp_path / "a.png"), num_workers=num_workers, collate_fn=list)
    cause = r"data\.json, record 0: image file .*a\.png is broken"
    with pytest.raises(SampleError, match=cause):
        next(iter(loader))
