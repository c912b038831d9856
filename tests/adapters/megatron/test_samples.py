"""What is read of Megatron's micro-batches beside the labels."""

from __future__ import annotations

import torch

from regate_ds.adapters.megatron.samples import ImageTokens, read_tokens
from regate_ds.data.keyed import KEY

IMAGE = -200


def item() -> dict:
    """Two rows of four tokens; the first has two images that touch, the second one."""
    tokens = torch.tensor([[IMAGE, IMAGE, 5, 6], [4, 5, IMAGE, 7]])
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]])
    key = (["set", "set"], torch.tensor([3, 4]))
    return {"tokens": tokens, "labels": tokens.roll(-1, 1), "loss_mask": mask, KEY: key}


def test_images_are_numbered_where_the_decoder_sees_them():
    read = read_tokens(item(), image=ImageTokens(placeholder=IMAGE, num_positions=2))
    assert read.image_BT.tolist() == [[0, 0, 1, 1, -1, -1], [-1, -1, 0, 0, -1, -1]]
    assert read.labels_BT.tolist()[0][4] == 6


def test_rows_that_are_padded_or_cut_keep_the_numbers_of_what_is_left():
    padded = ImageTokens(placeholder=IMAGE, num_positions=2, max_length=8, pads=True)
    assert read_tokens(item(), image=padded).image_BT.tolist()[1] == [-1, -1, 0, 0, -1, -1, -1, -1]
    cut = ImageTokens(placeholder=IMAGE, num_positions=2, max_length=3)
    assert read_tokens(item(), image=cut).image_BT.tolist() == [[0, 0, 1], [-1, -1, 0]]


def test_text_alone_has_no_image_numbers():
    assert read_tokens(item()).image_BT is None
