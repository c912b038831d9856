"""Images of a user's batch are told apart by the model's family, also where they touch."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from regate_ds.families.numbering import numbering_of

IMAGE, VIDEO = 9, 8


def model(model_type: str, **config: Any) -> SimpleNamespace:
    vision = SimpleNamespace(spatial_merge_size=2, patch_size=4)
    fields = {"image_token_id": IMAGE, "vision_config": vision, "model_type": model_type}
    return SimpleNamespace(config=SimpleNamespace(**{**fields, **config}))


LLAVA = model("llava")
QWEN = model("qwen2_vl", video_token_id=VIDEO)


def numbers(student: Any, ids: list[list[int]], *, elides: bool = True, **inputs: Any) -> Any:
    ids_BT = torch.tensor(ids)
    number_images = numbering_of(student, elides_images=elides)
    found = number_images({"input_ids": ids_BT, "labels": torch.zeros_like(ids_BT), **inputs})
    return None if found is None else found.tolist()


def grid(*rows: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(rows)


def test_images_of_llava_have_one_length_and_may_touch():
    ids = [[1, 9, 9, 9, 9, 5], [9, 9, 5, 5, 5, 5], [5] * 6]
    found = numbers(LLAVA, ids, pixel_values=torch.zeros(3, 3, 4, 4))
    assert found == [[-1, 0, 0, 1, 1, -1], [0, 0, -1, -1, -1, -1], [-1] * 6]


def test_images_of_llava_have_the_lengths_of_their_sizes_and_separators_inside():
    # A tower for any size: rows of patches with a separator, 2 x 1 patches and 1 x 2.
    ids = [[9, 7, 9, 7, 9, 9, 5]]
    sizes = torch.tensor([[8, 4], [4, 8]])
    found = numbers(LLAVA, ids, pixel_values=torch.zeros(2, 3, 8, 8), image_sizes=sizes)
    assert found == [[0, -1, 0, -1, 1, 1, -1]]


def test_a_clip_is_an_image_for_each_of_its_temporal_steps():
    ids = [[1, 9, 9, 8, 8, 8, 8, 9], [8, 8, 5, 5, 5, 5, 5, 5]]
    found = numbers(
        QWEN,
        ids,
        image_grid_thw=grid((1, 4, 2), (1, 2, 2)),
        video_grid_thw=grid((2, 2, 4), (2, 2, 2)),
    )
    assert found == [[-1, 0, 0, 1, 1, 2, 2, 3], [0, 1, -1, -1, -1, -1, -1, -1]]


@pytest.mark.parametrize("student", [LLAVA, QWEN], ids=["llava", "qwen2_vl"])
def test_a_batch_of_text_has_no_image(student: Any):
    assert numbers(student, [[1, 5, 6]]) == [[-1, -1, -1]]


def test_what_numbers_images_goes_to_the_loaders_workers():
    for student, elides in ((LLAVA, True), (LLAVA, False), (model("llava_next"), True)):
        pickle.dumps(numbering_of(student, elides_images=elides))


def test_inputs_without_token_ids_tell_nothing():
    for elides in (True, False):
        inputs = {"inputs_embeds": torch.zeros(1, 2, 3), "labels": torch.zeros(1, 2)}
        assert numbering_of(LLAVA, elides_images=elides)(inputs) is None


@pytest.mark.parametrize(
    ("student", "ids", "inputs", "message"),
    [
        (LLAVA, [[9, 9, 9]], {"pixel_values": torch.zeros(2, 3, 4, 4)}, "2 images, but 3 image"),
        (LLAVA, [[9, 9, 9]], {}, "has 3 image positions, but its images have 0 tokens"),
        (QWEN, [[9, 9, 8]], {"image_grid_thw": grid((1, 2, 4))}, "1 image positions, but .* 0"),
        (QWEN, [[1, 9], [9, 1]], {"image_grid_thw": grid((1, 2, 4))}, "of row 0 ends in a later"),
    ],
)
def test_placeholders_that_do_not_fit_the_images_are_refused(student, ids, inputs, message):
    with pytest.raises(ValueError, match=message):
        numbers(student, ids, **inputs)


def test_a_model_without_a_record_is_refused_by_name_where_image_tokens_are_elided():
    message = "image of a 'janus' model has is not known; .* 'regate_images'"
    with pytest.raises(ValueError, match=message):
        numbers(model("janus"), [[1, 5]])


def test_without_elided_images_runs_of_placeholders_are_images_whatever_the_model():
    ids = [[9, 9, 5, 8, 9]]
    assert numbers(model("llava_next"), ids, elides=False) == [[0, 0, -1, -1, 1]]
    assert numbers(QWEN, ids, elides=False) == [[0, 0, -1, 1, 1]]
    assert numbers(model("llama", image_token_id=None), ids, elides=False) is None
    assert numbers(LLAVA, ids, elides=False, labels=torch.zeros(1, 9)) is None


def test_images_that_touch_are_refused_where_runs_tell_them_apart():
    given = model("llava_next")
    assert numbers(given, [[9, 9, 5, 9]], image_sizes=torch.ones(2, 2)) == [[0, 0, -1, 1]]
    with pytest.raises(ValueError, match="the batch has 2 images, but 1 runs of placeholders"):
        numbers(given, [[9, 9, 9, 5]], image_sizes=torch.ones(2, 2))
