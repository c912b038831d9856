"""What a run will take, told beforehand, against what is measured of small models."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from regate_ds import cli
from regate_ds.algorithm.batch import host_labels
from regate_ds.cost.flops import RowCounts, rows_flops, tower_flops
from regate_ds.cost.samples import SampleSize, rows_of_micro
from regate_ds.cost.shape import shape_of
from regate_ds.families.table import family_of
from regate_ds.recipe.bench.arms import ARMS
from regate_ds.recipe.bench.case import StepCase
from regate_ds.recipe.bench.huggingface import HuggingFaceHost
from regate_ds.recipe.bench.measures import LiveBytes
from regate_ds.recipe.estimate.activations import activations_of
from regate_ds.recipe.estimate.forecast import Machine
from regate_ds.recipe.estimate.gpus import GPUS
from regate_ds.recipe.estimate.report import as_lines
from tests.support.models import llava
from tests.support.small_corpus import make_corpus

CASE = StepCase(hidden=64, layers=4, tokens=256, samples=4, vocabulary=256)


@pytest.fixture(scope="module")
def plain():
    with torch.device("meta"):
        return LlamaForCausalLM(CASE.llama())


def measured(name: str, *, recompute: bool) -> tuple[int, RowCounts]:
    """The peak of live bytes of one step, and its numbers."""
    case = StepCase(**{**vars(CASE), "recompute": recompute})
    host = HuggingFaceHost(case, {name: ARMS[name]}, torch.device("cpu"))
    with host.ready(name) as parts:
        plan, live = parts.plan(), LiveBytes()
        with live:
            found = parts.passes(plan, lambda micro: micro)
        parts.end(plan, found)
    (micro,) = plan.micro
    rows = RowCounts(
        count=case.samples,
        length=micro.num_tokens,
        slots=micro.num_slots,
        kept=micro.num_kept,
        num_targets=micro.num_targets,
    )
    return live.peak, rows


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_ratios_are_those_of_live_bytes_to_a_tenth(plain, recompute):
    def pair(name: str) -> tuple[float, float]:
        peak, rows = measured(name, recompute=recompute)
        spans = () if name == "ours_dense" else ARMS[name].spans(CASE)
        own = activations_of(plain, rows, spans, torch.float32, recompute=recompute)
        return peak, own.total

    peak, total = pair("ours_dense")
    for name in ("elide_0", "elide_1", "images_0", "images_1"):
        own_peak, own_total = pair(name)
        assert own_total / total == pytest.approx(own_peak / peak, rel=0.1), name
    assert total == pytest.approx(peak, rel=0.1)


def test_flops_of_a_tower_are_those_that_torch_counts():
    model = llava()
    shape = shape_of(model, family_of(model).tower_of(model))
    assert shape.tower is not None
    ids = torch.randint(1, 50, (2, 12))
    ids[:, 1:5] = model.config.image_token_id
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        labels = host_labels(ids.masked_fill(ids == model.config.image_token_id, -100))
        model(input_ids=ids, pixel_values=torch.randn(2, 3, 16, 16), labels=labels).loss.backward()
    rows = RowCounts(count=2, length=12, slots=12, kept=24, num_targets=24)
    # One position of the tower is its class, which becomes no token.
    flops = rows_flops(shape, rows, ()) + tower_flops(shape.tower, [4, 4], extra=1)
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_micro_batch_in_numbers_is_as_the_plan_would_be():
    samples = [SampleSize(10, 4, (4,)), SampleSize(8, 3, ())]
    rows = rows_of_micro(samples, (0.5, 0.25), None)
    # 2 of the prompt, 1 of 4 of the image, 2 of 4 answers; 5 of the prompt and 2 of 3 answers.
    assert rows == RowCounts(count=2, length=10, slots=7, kept=12, num_targets=4)
    packed = rows_of_micro(samples, None, 20)
    assert packed == RowCounts(count=1, length=18, slots=18, kept=18, num_targets=7)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("estimate")
    make_corpus(folder, num_train=12, num_test=2)
    return folder / "run.yaml"


def told(capsys, *arguments: str) -> dict:
    assert cli.main(["estimate", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_is_told_with_what_would_change_it(corpus, capsys):
    report = told(capsys, str(corpus), "--gpus", "2", "--what-if", "elision.keep_share=0.25")
    run, other = report["run"], report["what_if"]
    assert run["steps"] == {"dense": 4, "sparse": 8}
    assert run["seconds"]["sparse"] < run["seconds"]["dense"]
    assert other["seconds"]["sparse"] < run["seconds"]["sparse"]
    assert other["seconds"]["dense"] == run["seconds"]["dense"]
    memory = run["memory"]
    assert memory["sparse"] < memory["dense"]
    assert memory["dense, checkpointed"] < memory["dense"]
    assert run["before_seconds"] > 0
    assert sum(run["limits"].values()) == pytest.approx(run["seconds"]["sparse"], rel=1e-6)
    assert 0 < report["knobs"]["elision.images.keep_share=0.25"] < 1
    text = as_lines(report, Machine(GPUS["h100"], 2, 0.4), "h100")
    assert "a sparse step goes to: " in text
    assert "tower" in text
    assert "elision.images.keep_share=0.25 would take" in text


def test_other_data_are_read_for_what_they_would_take(corpus, capsys):
    half = corpus.parent / "half.json"
    half.write_text(json.dumps(json.loads((corpus.parent / "data/train.json").read_text())[:6]))
    data = [f"data.train={half}", f"data.image_root={corpus.parent / 'data'}"]
    other = told(capsys, str(corpus), "--gpus", "1", "--what-if", *data)["what_if"]
    del other["settings"]
    assert other == told(capsys, str(corpus), *data, "--gpus", "1")["run"]


def test_with_adapters_the_layers_weights_have_no_gradients_of_their_own(corpus, capsys):
    lora = ["model.lora.rank=2", "elision.execution=none", "--gpus", "1"]
    adapters = told(capsys, str(corpus), *lora)["run"]
    assert (
        0.6
        < adapters["seconds"]["dense"]
        / told(capsys, str(corpus), *lora[1:])["run"]["seconds"]["dense"]
        < 0.9
    )


def test_a_run_that_elides_nothing_costs_what_the_dense_one_does(corpus, capsys):
    run = told(capsys, str(corpus), "elision.execution=none", "--gpus", "1")["run"]
    assert run["steps"]["sparse"] == 0
    assert run["run_seconds"] == pytest.approx(run["dense_run_seconds"])
    assert run["before_seconds"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h900"], "--gpu h900: is not known; give one of a100"),
        (["--gpus", "0"], "--gpus 0"),
        (["--efficiency", "2"], "--efficiency 2.0"),
        (
            ["parallel={tensor: 2}", "run.deepspeed=null", "--gpus", "1"],
            "--gpus 1: one copy of the model takes 2",
        ),
    ],
)
def test_what_no_machine_is_is_refused_by_name(corpus, capsys, arguments, message):
    assert cli.main(["estimate", str(corpus), *arguments]) == 1
    assert message in capsys.readouterr().err
