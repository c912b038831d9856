"""What stands for an image is what its processor writes, also where no image is made to ask it."""

from __future__ import annotations

from random import Random

import pytest
from PIL import Image

from regate_ds.data.chat import image_text
from regate_ds.data.chat.counting import IMAGE_COUNTS
from regate_ds.data.chat.image_text import ImageText
from tests.support.processors import MAKERS, can_make, processor

NAMES = [name for name in MAKERS if can_make(name)]
COUNTED = [name for name in NAMES if type(processor(name)).__name__ in IMAGE_COUNTS]


@pytest.mark.parametrize("name", COUNTED)
def test_counting_is_asking_the_processor(name: str):
    own, random = processor(name), Random(name)
    images = ImageText(own, MAKERS[name][2])
    for _ in range(80):
        size = (random.randint(4, 150), random.randint(4, 150))
        assert images.texts([size]) == [images._asked(size, True)], size
    assert images._count is not None


@pytest.mark.parametrize("name", NAMES)
def test_the_images_of_a_sample_are_those_of_one_call(name: str):
    own, random = processor(name), Random(name)
    images = ImageText(own, MAKERS[name][2])
    for count in (1, 2, 3, 5):
        sizes = [(random.randint(9, 80), random.randint(9, 80)) for _ in range(count)]
        found = own(
            images=[[Image.new("RGB", size, "red") for size in sizes]],
            text=[images.placeholder * count],
            return_text_replacement_offsets=True,
        )
        wanted = [each["replacement"] for each in found["text_replacement_offsets"][0]]
        assert images.texts(sizes) == wanted


def test_a_count_that_is_wrong_for_a_processors_settings_is_not_relied_on():
    own = MAKERS["llava_next"][0]()
    # Its arithmetic takes the size to which an image is brought for that of a tile.
    own.image_processor.size = {"shortest_edge": 24}
    images, random = ImageText(own, "<image>"), Random(0)
    wrong = 0
    for _ in range(10):
        size = (random.randint(9, 80), random.randint(9, 80))
        assert images.texts([size]) == [images._asked(size, True)]
        wrong += IMAGE_COUNTS["LlavaNextProcessor"](own, size) != images.texts([size])[0]
    assert wrong > 0
    assert images._count is None


def test_settings_tell_another_version_of_transformers(monkeypatch: pytest.MonkeyPatch):
    before = ImageText(processor("qwen2_vl"), "<|image_pad|>").settings()
    monkeypatch.setattr(image_text, "version", lambda name: f"another {name}")
    assert ImageText(processor("qwen2_vl"), "<|image_pad|>").settings() != before


def test_sizes_of_one_text_share_its_memory():
    images = ImageText(processor("llava"), "<image>")
    texts = [images.texts([(40, 30 + number)])[0] for number in range(8)]
    assert len(set(map(id, texts))) == len(set(texts)) == 1
