import json

import pytest
import torch

from regate_ds.job.process import Process
from regate_ds.recipe import preflight
from regate_ds.recipe.config.tree import dump_config, load_config
from regate_ds.recipe.preflight import (
    describe_run,
    judge_run,
    judge_teacher,
    require_one_data_set,
    require_same_run,
)
from regate_ds.recipe.run_folder import RunFolder

CONFIG = """
model: {path: student}
data: {train: train.json}
teacher: {store: reference}
run: {steps: 10, save_every: 2}
"""


@pytest.fixture
def load(tmp_path):
    (tmp_path / "run.yaml").write_text(CONFIG)

    def config(*overrides):
        return load_config(tmp_path / "run.yaml", [f"run.out={tmp_path / 'run'}", *overrides])

    return config


@pytest.fixture
def begun(load):
    """A run that has done a step."""
    config = load()
    RunFolder(config.run.out).begin(dump_config(config))
    RunFolder(config.run.out).append_metrics({"step": 0})
    return load


def test_a_folder_with_a_run_is_refused_before_anything_is_loaded(begun):
    with pytest.raises(ValueError, match="holds a run already"):
        judge_run(begun())


def test_what_does_not_change_the_training_may_differ_on_resume(begun):
    free = ["save_every=3", "eval_every=0", "log_every=2", "keep_checkpoints=null"]
    judge_run(begun("run.resume=true", "data.num_workers=0", *(f"run.{key}" for key in free)))


def test_a_run_may_go_on_under_another_layout_but_not_under_another_optimizer(load, tmp_path):
    written = tmp_path / "config.yaml"
    written.write_text(dump_config(load("parallel={tensor: 2, sequence: true}")))
    require_same_run(load("parallel={pipeline: 2, virtual: 2}", "run.accumulation=4"), written)
    for other in ("parallel={distributed_optimizer: true}", "parallel=null"):
        with pytest.raises(ValueError, match="parallel.*was started with"):
            require_same_run(load(other), written)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=0.5", "optimizer.lr=0.5, but .* was started with 2e-05"),
        ("run.steps=11", "run.steps=11, but .* was started with 10"),
        ("data.train=other.json", "data.train='other.json', but .* started with 'train.json'"),
        ("model.lora={rank: 4}", "model.lora.rank=4, but .* was started with None"),
        ("run.deepspeed={bf16: {}}", "run.deepspeed.bf16={}, but .* was started with None"),
    ],
)
def test_what_changes_the_training_may_not_differ_on_resume(begun, override, message):
    config = begun("run.resume=true", override)
    with pytest.raises(ValueError, match=message):
        judge_run(config)


def test_only_a_run_can_be_resumed(load):
    with pytest.raises(ValueError, match="has no config.yaml, so it is not the folder of a run"):
        judge_run(load("run.resume=true"))


def test_a_run_that_resumes_if_it_can_may_be_new_or_begun_but_must_be_the_same(load, begun):
    judge_run(load("run.resume=auto"))
    judge_run(begun("run.resume=auto"))
    with pytest.raises(ValueError, match="run.steps=11, but .* was started with 10"):
        judge_run(begun("run.resume=auto", "run.steps=11"))


def test_a_run_that_resumes_if_it_can_does_not_lose_a_result(begun):
    config = begun("run.resume=auto")
    RunFolder(config.run.out).write_summary({})
    with pytest.raises(ValueError, match=r"has summary.json, but no checkpoint"):
        judge_run(config)


def test_a_json_that_contradicts_is_refused_before_anything_is_loaded(load, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="train_batch_size=2 disagrees with 3"):
        judge_run(load(f"run.deepspeed={json.dumps({'train_batch_size': 2})}"))


def test_a_run_says_how_much_of_it_is_sparse(load):
    config = load("elision.schedule.warmup=2", "elision.schedule.final_dense_share=0.2")
    assert describe_run(config, 10, {"teacher_id": "llama-1"}) == (
        "run: 10 steps, 6 of them sparse, kept share 0.700 of the answer tokens "
        "and 1.000 of the image tokens, teacher llama-1"
    )
    for dense in ("elision.keep_share=1.0", "elision.execution=none", "elision.enabled=false"):
        assert describe_run(load(dense), 10, {}) == (
            "run: 10 steps, 0 of them sparse, kept share 1.000 of the answer tokens "
            "and 1.000 of the image tokens, teacher none"
        )


def test_a_rank_that_has_read_other_data_is_named(monkeypatch):
    first, second = "ff" * 32, "0e" * 32
    monkeypatch.setattr(preflight, "is_same_on_all", lambda text, *_: text == second)
    require_one_data_set(second, Process(1, 2, torch.device("cpu")))
    with pytest.raises(RuntimeError, match="rank 0 has read data with fingerprint ffffffffffff"):
        require_one_data_set(first, Process(0, 2, torch.device("cpu")))


def test_a_number_of_ranks_that_makes_no_whole_teachers_is_refused(load):
    config = load("teacher.sharding=tensor", "teacher.tensor=2")
    judge_teacher(config, 4)
    with pytest.raises(ValueError, match=r"teacher\.tensor=2: the job has 3 ranks, .* of 3"):
        judge_teacher(config, 3)


@pytest.mark.parametrize("judge", [lambda config: judge_teacher(config, 1), judge_run])
def test_a_teacher_that_is_not_there_is_named_before_anything_is_loaded(load, judge):
    config = load("teacher.path=/nowhere", "teacher.mode=online")
    with pytest.raises(ValueError, match="teacher.path=/nowhere: holds no config.json; give the"):
        judge(config)


def test_a_teacher_inside_the_job_needs_no_store_but_whole_groups_of_ranks(load, monkeypatch):
    online = ["teacher.mode=online", "teacher.store=null"]
    judge_run(load(*online))
    shared = load(*online, "teacher.sharding=tensor", "teacher.tensor=2")
    with pytest.raises(ValueError, match=r"teacher\.tensor=2: the job has 1 ranks, .* of 1"):
        judge_run(shared)
    monkeypatch.setenv("WORLD_SIZE", "4")
    judge_run(shared)
    assert "teacher llama-1, online" in describe_run(shared, 10, {"teacher_id": "llama-1"})
