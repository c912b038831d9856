"""The first layer of a pipeline with merged steps."""

from __future__ import annotations

import pytest
import torch

from regate_ds.adapters.deepspeed.pipeline_layers import (
    Micro,
    MicroBatchTable,
    numbered,
    take_apart,
)
from regate_ds.adapters.merging.pipeline import merging_ends
from regate_ds.algorithm.executions.merge import mean_of_members, plan_patches
from regate_ds.algorithm.plan import plan_dense
from regate_ds.families.hosts import supported
from tests.support.batches import random_batch
from tests.support.models import causal_lm


def test_rows_of_another_length_than_the_plans_are_refused():
    host, table, (ids, batch) = causal_lm(), MicroBatchTable(), random_batch([[12]])
    embedded = host.get_input_embeddings()(ids)
    embed, *_ = take_apart(
        host,
        table,
        first_layer=1,
        needs_tower=False,
        with_entropy=False,
        ends=merging_ends(host, supported(host)),
    )
    number, merged = numbered(0, torch.device("cpu")), plan_patches(batch, size=3)
    for plan, wanted in (
        (plan_dense(batch), embedded),
        (merged, mean_of_members(embedded, merged)),
    ):
        table.micro = [Micro(plan, ("input_ids",))]
        assert torch.equal(embed((ids, number))[0], wanted)
        for other in (ids[:, :9], torch.nn.functional.pad(ids, (0, 3))):
            with pytest.raises(ValueError, match=r"reads 1 rows of \d+ .* 1 rows of 12; give"):
                embed((other, number))
