"""What a loop remembers where the score asks for entropies."""

from __future__ import annotations

import pytest
import torch

from tests.adapters.deepspeed.test_loop import batches, first_window, made


@pytest.mark.parametrize("own_loss", [False, True])
def test_the_entropies_of_a_step_are_remembered(own_loss: bool):
    model, regate = made(score="entropy", own_loss=own_loss)
    wanted = []
    for inputs in first_window(regate, batches()):
        output = model(**inputs)
        regate.token_losses(output) if own_loss else regate.loss(output)
        wanted.append(torch.full((output.plan.num_tokens * 2,), torch.inf))
        wanted[-1][output.plan.label_position_L] = output.entropy
    regate.step(applied=True)
    store = regate._opened.difficulty
    for batch, values in zip(batches(), wanted, strict=True):
        found = store.read(batch.tokens.flat_keys)["entropy"]
        assert torch.equal(found, values[batch.tokens.is_label_BT.flatten()])
