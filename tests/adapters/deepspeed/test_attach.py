"""What `attach` refuses before the model is changed."""

from __future__ import annotations

import pytest

from regate_ds.adapters.deepspeed.attach import attach
from regate_ds.config import RegateConfig
from tests.support.models import causal_lm
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
