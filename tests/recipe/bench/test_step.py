"""The step benchmark computes what its rows say; its times are no matter of a test."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from regate_ds.recipe.bench.arms import ARMS, arms_of
from regate_ds.recipe.bench.case import StepCase, read_case
from regate_ds.recipe.bench.huggingface import HuggingFaceHost
from regate_ds.recipe.bench.measures import DeviceWaits
from regate_ds.recipe.bench.step import run_case
from regate_ds.recipe.bench.table import step_table
from regate_ds.recipe.bench.timing import Measured, _measure_once
from tests.support.measure import assert_gradients_equal, gradients
from tests.support.oracle import oracle_loss
from tests.support.paths import ROOT

CASE = StepCase(hidden=64, layers=3, tokens=24, samples=2, vocabulary=97, kv_heads=1, rounds=1)
CPU = torch.device("cpu")
BY_LAYER = ("host", "dense", "ours_dense", "mask_full_head", "mask", "every_layer_full_head")
BY_LAYER += ("every_layer", "elide_0", "elide_1", "images_0", "images_1")
"""What the oracle of whole layers computes; the others have oracles beside their executions."""


@pytest.fixture(scope="module")
def host():
    host = HuggingFaceHost(CASE, ARMS, CPU)
    # Weights large enough that what a token attends to shows in the result.
    with torch.no_grad():
        for weight in host.weights:
            if weight.dim() > 1:
                weight.mul_(4.0)
    return host


@pytest.mark.parametrize("name", BY_LAYER)
def test_a_row_has_the_gradients_of_the_oracle(host, name):
    arm, model = ARMS[name], host._model
    with host.ready(name) as parts:
        plan = parts.plan()
        parts.end(plan, parts.passes(plan, lambda micro: micro))
        found = gradients(model)
    (batch,) = host._data.batches
    (micro,) = plan.micro
    embedded = model.get_input_embeddings()(batch.inputs["input_ids"])
    gated = range(arm.first_layer, CASE.layers if micro.moves_rows else 0)
    loss = oracle_loss(model, embedded, batch.tokens, micro, gated)
    (loss / plan.num_targets_global).backward()
    expected = gradients(model)
    model.zero_grad()
    assert_gradients_equal(found, expected, 2e-5)


@pytest.mark.parametrize("name", ARMS)
def test_flops_are_those_that_torch_counts(host, name):
    arm = ARMS[name]
    counter = FlopCounterMode(display=False)
    with host.ready(name) as parts:
        plan = parts.plan()
        with sdpa_kernel(SDPBackend.MATH), counter:
            found = parts.passes(plan, lambda micro: micro)
        parts.end(plan, found)
    flops = sum(arm.flops(CASE, host.shape, micro) for micro in plan.micro)
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    causal = sum(arm.flops(CASE, host.shape, micro, causal=True) for micro in plan.micro)
    assert causal < flops


@pytest.mark.parametrize("name", ARMS)
def test_no_row_of_ours_waits_for_the_device_where_the_host_does_not(host, name):
    found = Measured()
    _measure_once(CASE, host, ARMS[name], name, found, CPU)
    assert found.waits == (1 if name == "host" else 0)
    # The losses come to the host once, in one piece.
    assert found.waits_at_end == int(
        host._sessions[name].config.chooses_answers and name != "random_ltd"
    )


def test_waits_are_counted_where_a_tensor_is_on_the_device():
    there, here = torch.arange(6.0), torch.arange(6.0)
    waits = DeviceWaits([there])
    with waits.watching():
        assert here.sum().item() == 15
        assert len(here[here > 2]) == 3
        made = there * 2 + here
        assert waits.total == 0
        assert bool(made[0] == 0)
        assert len(made[made > 3]) == 4
        assert made.view(2, 3).tolist()[0][0] == 0
        on_host = made.cpu()
        assert len(on_host.nonzero()) == 5
        on_host.sum().item()
    assert dict(waits.by_name) == {
        "_local_scalar_dense": 1,
        "index.Tensor": 1,
        "tolist": 1,
        "cpu": 1,
    }


def test_the_table_has_every_row_and_the_json_its_case():
    result = run_case(
        read_case(None, ["hidden=64", "layers=2", "tokens=16", "rounds=1", "samples=1"])
    )
    case = StepCase(hidden=64, layers=2, tokens=16, rounds=1, samples=1)
    assert list(result["rows"]) == list(arms_of(case))
    assert "random_ltd" not in result["rows"]
    dense, ours = result["rows"]["dense"], result["rows"]["elide_0"]
    assert dense["of_dense"] == dense["ideal"] == dense["saved_of_dense"] == 1.0
    assert ours["ideal"] < 1.0
    assert 0.95 < ours["saved_over_share"] < 1.2
    assert ours["peak_bytes"] < dense["peak_bytes"]
    assert "elide_0" in step_table(result)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tokens=2"], "tokens=2: must be at least 4"),
        (["hidden=100"], "hidden=100: must be a multiple of 64"),
        (["image_share=1"], "image_share=1: must be from 0 to 0.9"),
        (["keep_share=0"], "keep_share=0: must be above 0"),
        (["zero_stage=4"], "zero_stage=4: must be 0 to 3"),
        (["tensor=2"], "tensor=2: host=huggingface has no such axis"),
        (["data_ranks=2"], "data_ranks=2: needs a zero_stage"),
        (["host=megatron", "sequence=true"], "sequence=True: needs tensor above 1"),
        (["host=deepspeed_pipeline"], "pipeline=1: must be at least 2"),
        (["host=megatron", "pipeline=3"], "layers=4: must be a multiple of pipeline=3"),
        (["colour=1"], "unknown key"),
        (["rounds=0"], "rounds=0: must be at least 1"),
    ],
    ids=str,
)
def test_a_case_that_cannot_be_is_refused_by_name(overrides, message):
    with pytest.raises(ValueError, match=message):
        read_case(None, overrides)


def test_the_file_of_settings_holds_the_defaults():
    assert read_case(ROOT / "configs" / "bench" / "step.yaml", []) == StepCase()


def test_a_row_that_a_host_lacks_is_refused_by_name():
    with pytest.raises(ValueError, match="'mlp_only' is not among those of host=megatron"):
        arms_of(StepCase(host="megatron", arms=("mlp_only",)))
