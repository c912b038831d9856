import json
from pathlib import Path
from typing import Any

import pytest
import torch

from regate_ds.job.ranks import Ranks, ranks_on_node
from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.estimate.needs import estimate, existing, free_memory
from regate_ds.recipe.students.load import make_student
from regate_ds.recipe.tasks.pretraining.tokenizer import train_tokenizer
from tests.support.small_corpus import TEXT, VISION


@pytest.fixture
def load(tmp_path):
    train_tokenizer(["a small text"], vocab_size=300).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "run.yaml").write_text(
        f"model: {{tokenizer: {tmp_path / 'tokenizer'}, text: {TEXT}, vision: {VISION}}}\n"
        f"data: {{train: train.json}}\nteacher: {{store: s}}\nrun: {{out: {tmp_path / 'out'}}}\n"
    )
    return lambda *overrides: load_config(tmp_path / "run.yaml", overrides)


def stage(number: int) -> str:
    return f"run.deepspeed={{zero_optimization: {{stage: {number}}}}}"


@pytest.fixture
def size(load):
    model = make_student(load().model, seed=0).model
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("overrides", "bytes_each"),
    [
        ([], 2 + 2 + 12),
        (["run.precision=fp32"], 4 + 4 + 8),
        ([stage(1)], 2 + 2 + 12 / 4),
        ([stage(2)], 2 + 2 / 4 + 12 / 4),
        ([stage(3)], (2 + 2 + 12) / 4),
    ],
)
def test_memory_is_weights_gradients_and_optimizer_cut_as_zero_does(
    load, size, overrides, bytes_each
):
    found = estimate(load(*overrides), 4).memory
    assert found == pytest.approx(bytes_each * size, abs=4)


@pytest.mark.parametrize(
    ("distributed", "precision", "bytes_each"),
    [
        ("false", "bf16", 2 + 4 + 12),
        ("true", "bf16", 2 + 4 + 12 / 2),
        ("true", "fp32", 4 + 4 + 8 / 2),
    ],
)
def test_ranks_hold_parts_of_the_decoder_and_data_ranks_those_of_the_optimizer(
    load, distributed, precision, bytes_each
):
    layout = f"parallel={{tensor: 2, distributed_optimizer: {distributed}}}"
    config = load(layout, f"run.precision={precision}")
    inner: Any = make_student(config.model, seed=None).model
    text = [*inner.model.language_model.parameters(), *inner.lm_head.parameters()]
    decoder = sum(p.numel() for p in text)
    tower = sum(p.numel() for p in inner.parameters()) - decoder
    found = estimate(config, 4).memory
    assert found == pytest.approx(bytes_each * (decoder / 2 + tower), abs=4)


def test_expert_ranks_hold_parts_of_the_experts(load, size):
    experts = {**TEXT, "model_type": "mixtral", "num_local_experts": 4}
    layout = "parallel={expert: 4, distributed_optimizer: true}"
    config = load(f"model.text={json.dumps(experts)}", layout)
    inner: Any = make_student(config.model, seed=None).model
    sizes = {name: weight.numel() for name, weight in inner.named_parameters()}
    shared = sum(number for name, number in sizes.items() if ".experts." in name)
    rest = sum(sizes.values()) - shared
    assert shared > rest / 2
    wanted = (2 + 4 + 12 / 4) * rest + (2 + 4 + 12) * shared / 4
    assert estimate(config, 4).memory == pytest.approx(wanted, abs=4)


def test_context_ranks_hold_all_weights_each(load, size):
    assert estimate(load("parallel={context: 2}"), 4).memory == pytest.approx(18 * size, abs=4)


def test_a_frozen_weight_has_no_gradient_and_no_optimizer(load, size):
    lora = estimate(load("model.lora.rank=2"), 1).memory
    assert 2 * size < lora < 3 * size


@pytest.mark.parametrize(("keep", "checkpoints"), [("1", 2), ("3", 4), ("null", 6)])
def test_disk_is_what_is_kept_and_what_is_being_written_and_the_model(
    load, size, keep, checkpoints
):
    config = load(f"run.keep_checkpoints={keep}", "run.steps=50", "run.save_every=10")
    assert estimate(config, 1).disk == checkpoints * 14 * size + 2 * size


def test_the_disk_of_a_folder_to_come_is_that_of_the_one_above_it(tmp_path):
    assert existing(tmp_path / "runs" / "one") == tmp_path
    assert existing(Path()) == Path().absolute()


@pytest.mark.parametrize("name", ["MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"])
def test_tasks_of_mpiexec_share_their_nodes_memory(monkeypatch, name: str):
    monkeypatch.setenv(name, "4")
    assert ranks_on_node(Ranks("mpiexec", 0, 8)) == 4


def test_the_ranks_of_a_node_share_its_memory(monkeypatch):
    ranks = Ranks("srun", 0, 8)
    assert ranks_on_node(Ranks("none")) == 1
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "4(x2)")
    assert ranks_on_node(ranks) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert ranks_on_node(ranks) == 2


def test_a_rank_has_the_memory_of_its_own_gpu(monkeypatch):
    free = [8, 5]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=0: (free[device], 8))
    found = [free_memory(Ranks("torchrun", rank, 4, rank % 2)) for rank in range(4)]
    assert found == [8, 5, 8, 5]
