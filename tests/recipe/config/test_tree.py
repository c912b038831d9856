import json
import re
from pathlib import Path

import pytest
import yaml

from regate_ds.recipe.config.deepspeed_json import deepspeed_config
from regate_ds.recipe.config.tree import RunConfig, dump_config, load_config
from regate_ds.recipe.students.load import make_student
from tests.recipe.config.table_helper import HEAD, rows
from tests.support.paths import ROOT

SMALL = {
    "model": {"path": "student"},
    "data": {"train": "train.json"},
    "teacher": {"store": "reference"},
    "run": {"out": "runs/one"},
}


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


def load(small: Path, *overrides: str) -> RunConfig:
    return load_config(small, overrides)


def test_values_come_from_the_file_then_from_the_overrides(small):
    config = load(small, "run.steps=7", "optimizer.betas=[0.8, 0.9]", "elision.first_layer=2")
    assert config.model.path == Path("student")
    assert config.run.steps == 7
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.elision.first_layer == 2


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("auto", "auto")])
def test_a_choice_may_be_a_switch_or_a_word(small, text, value):
    assert load(small, f"run.resume={text}").run.resume == value
    with pytest.raises(ValueError, match="run.resume=1: must be one of false, true, auto"):
        load(small, "run.resume=1")


def test_an_override_reaches_into_sections_that_are_null_or_absent(small):
    config = load(small, "model.lora.rank=8", "data.template.user='Q: '")
    assert config.model.lora is not None
    assert config.model.lora.rank == 8
    assert config.data.template.user == "Q: "


@pytest.mark.parametrize(("text", "value"), [("2e-5", 2e-5), ("3E+1", 30.0), ("1.e2", 100.0)])
def test_a_number_in_scientific_notation_is_not_text(small, text, value):
    assert load(small, f"optimizer.lr={text}").optimizer.lr == value


def test_a_key_that_stands_twice_is_refused(small):
    small.write_text("run: {out: a}\nmodel: {path: s, path: t}\n")
    with pytest.raises(ValueError, match="key 'path' stands twice.* line 2"):
        load(small)


def test_what_is_written_as_resolved_is_read_back_as_the_same_tree(small, tmp_path):
    config = load(small, "model.lora.rank=8", "run.deepspeed={zero_optimization: {stage: 2}}")
    again = tmp_path / "config.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_named_configurations_are_valid(path):
    assert load_config(path).elision.keep_share == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "elision.keep_shar=0.5",
            "elision.keep_shar=0.5: unknown key; did you mean elision.keep_s",
        ),
        (
            "elisoin.keep_share=0.5",
            "elisoin={'keep_share': 0.5}: unknown key; did you mean elision?",
        ),
        ("run.qqq=1", "run.qqq=1: unknown key; known are out, epochs, "),
        ("parallel.experts=2", "parallel.experts=2: unknown key; did you mean parallel.expert"),
        ("model.lora.ranks=2", "model.lora.ranks=2: unknown key; did you mean model.lora.rank?"),
        (
            "data.template.usr=2",
            "data.template.usr=2: unknown key; did you mean data.template.user",
        ),
        ("elision.keep_share=1.5", "elision.keep_share=1.5: must be in [1e-6, 1]"),
        ("elision.keep_share=half", "elision.keep_share='half': must be a number"),
        ("elision.enabled=1", "elision.enabled=1: must be true or false"),
        ("elision={}x", "override 'elision={}x': '{}x' is not a YAML value"),
        ("elision=3", "elision=3: must hold keys"),
        ("run.balance=1", "run.balance=1: must be true or false"),
        ("run.steps=1.5", "run.steps=1.5: must be a whole number"),
        ("run.steps=true", "run.steps=True: must be a whole number"),
        ("run.steps=0", "run.steps=0: must be at least 1, or null"),
        ("run.micro_batch=0", "run.micro_batch=0: must be at least 1"),
        ("run.micro_batch=null", "run.micro_batch=None: must be a whole number"),
        ("run.eval_every=-1", "run.eval_every=-1: must be 0 or more"),
        ("run.eval_every=5", "run.eval_every=5: there is nothing to evaluate on; set data.test"),
        ("run.precision=fp16", "run.precision='fp16': must be one of fp32, bf16"),
        ("run.out=3", "run.out=3: must be a path"),
        ("run.deepspeed=[1]", "run.deepspeed=[1]: must be a path"),
        ("optimizer.lr=0", "optimizer.lr=0: must be above 0"),
        ("optimizer.lr=.nan", "optimizer.lr=nan: must be a number"),
        ("optimizer.lr='4'", "optimizer.lr='4': must be a number"),
        (f"optimizer.lr=1{'0' * 400}", "0: must be a number that 64 bits hold"),
        (f"run.seed={2**63}", f"run.seed={2**63}: must be a number that 64 bits hold"),
        ("run.steps=1e400", "run.steps=inf: must be a whole number"),
        ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]: must be a list of 2 values"),
        ("optimizer.betas=0.9", "optimizer.betas=0.9: must be a list"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas=(0.9, 1.0): must be in [0, 1)"),
        ("optimizer.grad_clip=0", "optimizer.grad_clip=0: must be above 0; null does not clip"),
        ("optimizer.warmup_steps=2.5", "optimizer.warmup_steps=2.5: must be a whole number, or"),
        ("model.lora={rank: 0}", "model.lora.rank=0: must be at least 1"),
        ("model.text={hidden_size: 8}", "model.text={'hidden_size': 8}: conflicts with model.path"),
        ("model.path=null", "model.text={}: is needed without model.path; set one"),
        ("data.name=''", "data.name='': must not be empty"),
        ("data.pack_length=64", "data.pack_length=64: must be at least max_length=2048, or null"),
        ("data.video_frames=0", "data.video_frames=0: must be at least 1, or null"),
        ("teacher.store=null", "teacher.store=None: elision ranks tokens by the teacher's losses"),
        ("teacher.sharding=tp", "teacher.sharding='tp': must be one of none, tensor, zero3"),
        ("teacher.sharding=tensor", "teacher.tensor=1: sharding=tensor needs at least 2"),
        ("teacher.tensor=2", "teacher.tensor=2: sharding=none allows 1 only"),
        ("teacher.column=image", "teacher.column='image': must be one of text, student, gain"),
        ("teacher.column=gain", "teacher.column=gain: elision.score reads the column text; set"),
        ("elision.score=gain", "teacher.column=text: elision.score reads the column gain; set"),
        ("run.steps", "override 'run.steps' is not of the form section.key=value"),
        ("run.out={{ a }}", "override 'run.out={{ a }}': '{{ a }}' is not a YAML value"),
        ("run..steps=1", "override 'run..steps=1' is not of the form section.key=value"),
        ("run.steps.more=1", "run.steps={'more': 1}: must be a whole number"),
        ("run.out.more=1", "override 'run.out.more=1': run.out has no keys"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_that_names_it(small, override, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        load(small, override)
    assert "\n" not in str(refusal.value)


def test_a_key_that_is_no_single_value_is_refused_in_one_line(small):
    small.write_text("run: {out: {{ folder }}}\n")
    with pytest.raises(ValueError, match="a key must be a single value.* line 1") as refusal:
        load(small)
    assert "\n" not in str(refusal.value)


def test_without_elision_there_is_nothing_to_plan(small):
    with pytest.raises(ValueError, match=r"run.plan_only=True: with elision.enabled=false"):
        load(small, "run.plan_only=true", "elision.enabled=false")


@pytest.mark.parametrize("section", ["model", "data", "run"])
def test_a_missing_section_is_named(small, section):
    small.write_text(yaml.safe_dump({k: v for k, v in SMALL.items() if k != section}))
    with pytest.raises(ValueError, match=f"{section} is missing; it has no default"):
        load(small)


@pytest.mark.parametrize(
    ("text", "message"),
    [("model: [", "is not YAML"), ("- a\n- b", "holds a list"), ("", "model is missing")],
)
def test_a_file_that_is_not_a_configuration_is_refused_by_name(small, text, message):
    small.write_text(text)
    with pytest.raises(ValueError, match=message) as refusal:
        load(small)
    assert str(small) in str(refusal.value)


def test_a_configuration_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"configuration .*none.yaml cannot be read .*; give a Y"):
        load_config(tmp_path / "none.yaml")


def test_the_documentation_lists_every_key_as_it_is():
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert text.partition(HEAD)[2].strip().splitlines() == list(rows()), (
        "replace the table under 'Every key' in docs/configuration.md by what is printed by "
        "python -m tests.recipe.config.table_helper"
    )


def test_the_documented_student_is_made_as_it_stands(small, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "configuration.md").read_text()
    code, config = (text.split(f"```{kind}\n")[1].split("```")[0] for kind in ("python", "yaml"))
    monkeypatch.chdir(tmp_path)
    exec(code, {"texts": ["Where is the red three?", "It is in the top row."]})  # noqa: S102
    fresh = yaml.safe_load(config)["model"]
    small.write_text(yaml.safe_dump({**yaml.safe_load(small.read_text()), "model": fresh}))
    student = make_student(load(small).model, seed=0)
    assert student.vision.num_tokens((48, 48)) == 9
    with pytest.raises(ValueError, match="model.tokenizer=elsewhere: no such folder"):
        make_student(load(small, "model.tokenizer=elsewhere").model, seed=0)


def with_json(small: Path, user: dict, *overrides: str, world_size: int = 2) -> dict:
    inline = f"run.deepspeed={json.dumps(user)}"
    return deepspeed_config(load(small, inline, "run.micro_batch=3", *overrides), world_size)


def test_without_a_json_deepspeed_runs_zero_stage_0_with_our_settings(small):
    config = load(small, "run.micro_batch=3", "run.accumulation=4", "optimizer.grad_clip=null")
    assert deepspeed_config(config, world_size=2) == {
        "zero_optimization": {"stage": 0},
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 4,
        "train_batch_size": 24,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
    }


def test_a_json_file_and_its_content_are_the_same(small, tmp_path):
    user = {"zero_optimization": {"stage": 2, "overlap_comm": False}, "bf16": {"enabled": "auto"}}
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(user))
    merged = with_json(small, user)
    assert merged == deepspeed_config(
        load(small, f"run.deepspeed={path}", "run.micro_batch=3"), world_size=2
    )
    assert merged["zero_optimization"] == user["zero_optimization"]
    assert merged["bf16"] == {"enabled": True}


def test_merging_leaves_the_configuration_as_it_was(small):
    config = load(small, "run.deepspeed={bf16: {enabled: auto}, optimizer: auto}")
    deepspeed_config(config, world_size=1)
    assert config.run.deepspeed == {"bf16": {"enabled": "auto"}, "optimizer": "auto"}


def test_auto_takes_ours_and_elsewhere_deepspeeds_default(small):
    user = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto"}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
    }
    merged = with_json(small, user)
    assert (merged["train_batch_size"], merged["gradient_clipping"]) == (6, 1.0)
    assert merged["zero_optimization"] == {"stage": 3}
    assert "optimizer" not in merged
    assert "scheduler" not in merged


def test_equal_values_agree(small):
    user = {
        "train_micro_batch_size_per_gpu": 3,
        "train_batch_size": 6,
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-5, "betas": [0.9, 0.999]}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 10}},
    }
    assert with_json(small, user, "optimizer.warmup_steps=10")["train_batch_size"] == 6


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu=4 .* 3 .run.micro"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4 .* 1 .run.accum"),
        ({"train_batch_size": 3}, r"train_batch_size=3 .* 6 .run.micro_batch \* .* 2 ranks"),
        ({"gradient_clipping": 0.5}, "gradient_clipping=0.5 .* 1.0 .optimizer.grad_clip"),
        ({"bf16": {"enabled": False}}, "bf16.enabled=False .* True .run.precision=bf16"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=True .* False .run.precision=bf16"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage=4: must be one of 0, 1"),
        ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage='2': must be one of"),
        ({"zero_optimization": True}, "zero_optimization=True: must hold keys"),
        ({"bf16": True}, "bf16=True: must hold keys"),
        ({"bfloat16": {"enabled": True}}, "bfloat16 is DeepSpeed's old name; write bf16"),
        ({"amp": {"enabled": True}}, "amp.enabled=True is not supported"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled=True is not supported"),
        ({"optimizer": {"type": "Lion"}}, "optimizer.type='Lion' .* 'AdamW'"),
        ({"optimizer": {"params": {"lr": 1.0}}}, "optimizer.params.lr=1.0 .* 2e-05"),
        ({"optimizer": {"params": {"fuse": 1}}}, "optimizer.params.fuse=1 has no counterpart"),
        ({"optimizer": "AdamW"}, "optimizer='AdamW': must hold keys"),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.type='OneCycle' .* 'WarmupCosineLR'"),
        (
            {"scheduler": {"params": {"warmup_max_lr": 1.0}}},
            "scheduler.params.warmup_max_lr=1.0 .* 2e-05 .optimizer.lr",
        ),
    ],
    ids=str,
)
def test_a_json_that_disagrees_is_refused_with_both_values(small, user, message):
    with pytest.raises(ValueError, match=message):
        with_json(small, user)


def test_an_offloaded_optimizer_may_be_torchs(small):
    zero = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert with_json(small, zero)["zero_force_ds_cpu_optimizer"] is False
    own = {**zero, "zero_force_ds_cpu_optimizer": True}
    assert with_json(small, own)["zero_force_ds_cpu_optimizer"] is True
    assert "zero_force_ds_cpu_optimizer" not in with_json(small, {})


def test_a_json_that_is_not_there_is_named(small, tmp_path):
    with pytest.raises(ValueError, match="run.deepspeed=.*none.json: cannot be read: No such"):
        deepspeed_config(load(small, f"run.deepspeed={tmp_path / 'none.json'}"), world_size=1)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ("[]", "must hold a JSON object")]
)
def test_a_broken_json_file_is_named(small, tmp_path, text, message):
    path = tmp_path / "zero.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as refusal:
        deepspeed_config(load(small, f"run.deepspeed={path}"), world_size=1)
    assert str(path) in str(refusal.value)
