"""What `attach` refuses before the model is changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regate_ds.adapters.torch.attach import attach
from regate_ds.algorithm.batch import TokenBatch
from regate_ds.config import RegateConfig
from tests.support.models import IMAGE_TOKEN, causal_lm, llava
from tests.support.planning import config_of


@pytest.mark.parametrize("total_steps", [0, 16.0, "16", True])
def test_a_length_that_is_no_number_of_steps_is_refused(total_steps):
    message = f"total_steps={total_steps!r}: must be a whole number, at least 1"
    with pytest.raises(ValueError, match=message):
        attach(causal_lm(), config_of(score="random"), total_steps=total_steps)


def test_a_score_without_the_losses_that_it_reads_is_refused_and_the_model_is_untouched():
    model = causal_lm()
    message = "score=Fused needs the teacher's losses, but reference=None; give a ReferenceStore"
    with pytest.raises(ValueError, match=message):
        attach(model, RegateConfig(), total_steps=4)
    assert all("forward" not in vars(module) for module in model.modules())


def collated(model: nn.Module, **inputs: torch.Tensor) -> TokenBatch:
    """The tokens of a batch of one sample, by the collate function of a run that elides images."""
    config = config_of(score="random", images={"keep_share": 0.5})
    regate = attach(model, config, total_steps=4)
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * 8, 6, 7]])
    batch = {"input_ids": ids, "labels": ids, **inputs}
    return regate.collate(lambda items: batch)([{"regate_key": ("mine", 0)}]).tokens


def test_images_of_a_known_family_are_told_apart_where_they_touch():
    tokens = collated(llava(), pixel_values=torch.zeros(2, 3, 16, 16))
    assert tokens.image_BT.tolist() == [[-1, 0, 0, 0, 0, 1, 1, 1, 1, -1, -1]]


def test_images_that_nobody_tells_apart_are_refused_and_the_batch_itself_may_number_them():
    with pytest.raises(ValueError, match="of a 'llama' model has is not known.*'regate_images'"):
        collated(causal_lm())
    image_BT = torch.tensor([[-1, 0, 0, 1, 1, 1, 2, 2, -1, -1, -1]])
    assert torch.equal(collated(causal_lm(), regate_images=image_BT).image_BT, image_BT)
