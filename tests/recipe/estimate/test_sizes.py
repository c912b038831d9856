"""What a run's samples cost in each of its steps, by which run.balance divides them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regate_ds.cost.samples import sample_flops
from regate_ds.job.process import Process
from regate_ds.recipe.config.tree import load_config
from regate_ds.recipe.corpus import load_corpus
from regate_ds.recipe.estimate.ran import run_host, run_shape
from regate_ds.recipe.estimate.sizes import sample_sizes
from regate_ds.recipe.order import make_order
from tests.support.small_corpus import make_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sizes")
    make_corpus(path, num_train=16, num_test=1)
    return path


@pytest.mark.parametrize("freeze", [False, True])
def test_costs_follow_the_schedule_of_the_run_and_what_it_trains(folder: Path, freeze: bool):
    settings = ["run.balance=true", "run.epochs=3", "run.steps=null", "run.micro_batch=2"]
    settings += [f"model.freeze_vision={freeze}", "elision.images.keep_share=0.5"]
    settings += ["elision.schedule={warmup: 0.5, final_dense_share: 0}", "run.accumulation=2"]
    config = load_config(folder / "run.yaml", settings)
    corpus = load_corpus(config, weights=False)
    order = make_order(config, corpus, Process(0, 2, torch.device("cpu")))
    assert (order.total_steps, order.steps_per_epoch) == (6, 2)
    assert order.costs is not None
    dense, sparse = order.costs(2), order.costs(3)
    shape, sizes = run_shape(run_host(config)), sample_sizes(corpus)
    assert dense == order.costs(0) == [sample_flops(shape, one) for one in sizes]
    assert sparse == order.costs(5)
    assert all(less < more for less, more in zip(sparse, dense, strict=True))
    whole = load_config(folder / "run.yaml", [s for s in settings if "freeze" not in s])
    all_trained = sample_flops(run_shape(run_host(whole)), sizes[0])
    assert (dense[0] < all_trained) == freeze
