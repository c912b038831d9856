"""What `regate pretrain` refuses, in one line that names the thing, its value and the way out."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from regate_ds.cli import main
from regate_ds.objectives.contract import Inputs
from regate_ds.objectives.plain import Masked
from regate_ds.objectives.table import OBJECTIVES
from regate_ds.recipe.preflight import judge_folder
from regate_ds.recipe.pretrain.config import PretrainTree, load_pretrain
from regate_ds.recipe.pretrain.engine import _require_stage
from regate_ds.recipe.pretrain.models import build_module
from regate_ds.recipe.pretrain.rows import open_rows, patches_of
from regate_ds.recipe.pretrain.trainer import Pretraining
from regate_ds.recipe.run_folder import RunFolder
from regate_ds.settings.section import plain_values
from tests.objectives.small_helper import make_rows
from tests.recipe.config.table_helper import HEAD, rows
from tests.recipe.pretrain.pretrain_helper import DECODER, ENCODER, config_of, make_data, pictures
from tests.support.paths import ROOT

INPUTS = Inputs(num_tokens=271, pad_id=2, mask_id=270, special_ids=(0, 1, 2, 3, 270))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.pictures=true"], "data.pictures=True: objective=replaced_token reads text alone"),
        (["objective=causal", "helper.hidden_size=4"], "objective=causal has no helper"),
        (["objective=electra"], "objective='electra': must be one of replaced_token, multi_choice"),
        (["replaced_token.weight=0"], "replaced_token.weight=0: must be above 0"),
        (["data.length=1"], "data.length=1: must be at least 2"),
        (["data.patch=0"], "data.patch=0: must be at least 1"),
        (["data.held_out=1.0"], "data.held_out=1.0: must be above 0 and below 1"),
        (["run.steps=0"], "run.steps=0: must be at least 1"),
        (["run.seed=-1"], "run.seed=-1: must be 0 or more"),
        (["run.grace_seconds=0"], "run.grace_seconds=0: must be at least 1, or null"),
        (["run.stepz=1"], r"unknown key; did you mean run.steps\?"),
    ],
)
def test_a_configuration_that_cannot_be(tmp_path: Path, overrides: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, "out", *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.vocab_size=9"], "model.vocab_size=9: is the tokenizer's own; leave it out"),
        (["model.model_type=bort"], "makes no model"),
        (["model.num_attention_heads=5"], "makes no model"),
        (["model.num_attention_heads=6"], "model.num_attention_heads=6: a helper 4 times narrower"),
        (["objective=causal"], "model.model_type=bert: is an encoder, but the objective needs a"),
        ([f"model={json.dumps(DECODER)}"], "model.model_type=llama: is a decoder, but the objec"),
        (["model.max_position_embeddings=11"], "max_position_embeddings=11: rows have up to 12"),
    ],
)
def test_a_model_that_does_not_suit(tmp_path: Path, overrides: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        build_module(config_of(tmp_path, "out", *overrides), INPUTS, longest=12)


KINDS = [
    ("replaced_token", {"model_type": "electra", "embedding_size": 20}),
    ("multi_choice", {"model_type": "electra", "embedding_size": 20}),
    ("causal", {"model_type": "qwen2", "num_key_value_heads": 4}),
    ("free_language_modeling", {"model_type": "qwen2", "num_key_value_heads": 4}),
]


@pytest.mark.parametrize(("objective", "fields"), KINDS)
def test_other_families_are_trained_as_well(tmp_path: Path, objective: str, fields: dict):
    given = json.dumps({**ENCODER, **fields})
    config = config_of(tmp_path, "out", f"model={given}", f"objective={objective}")
    module = build_module(config, INPUTS, longest=12)
    batch = make_rows((7, 5))
    draw = config.objective.draw(batch, INPUTS, seed=0, step=0)
    sum(module(batch, draw).values()).backward()
    missing = [name for name, p in module.named_parameters() if p.grad is None]
    assert not missing


def test_new_weights_depend_on_the_seed_alone(tmp_path: Path):
    modules = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(modules))
        before = torch.get_rng_state()
        config = config_of(tmp_path, "out", f"run.seed={seed}")
        modules.append(build_module(config, INPUTS, longest=12).state_dict())
        assert torch.equal(before, torch.get_rng_state())
    name = "helper.body.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(modules[0][name], modules[1][name])
    assert not torch.equal(modules[0][name], modules[2][name])
    assert modules[0][name].shape == (6, 6)


def test_data_that_is_none(tmp_path: Path):
    make_data(tmp_path)
    path = tmp_path / "captions.jsonl"
    config = config_of(tmp_path, "out", *pictures(tmp_path, "masked"), f"model={DECODER}")
    opened = open_rows(config.data)
    assert opened.inputs.patch_size == 4 * 4 * 3
    assert opened.longest == 4 + max(map(len, [*opened.train.ids, *opened.held_out.ids]))
    path.write_text(path.read_text() + '\n{"image": "1.png"}\n')
    with pytest.raises(ValueError, match=r"captions.jsonl, line 41: must be an object with texts"):
        open_rows(config.data)
    with pytest.raises(ValueError, match=r"0.png: has 8 x 8 pixels; data.patch=3 must divide both"):
        patches_of(tmp_path / "0.png", 3)
    with pytest.raises(ValueError, match=r"text.txt: is no picture that can be read"):
        patches_of(tmp_path / "text.txt", 4)


def test_patches_are_read_row_by_row(tmp_path: Path):
    picture = Image.new("RGB", (4, 4))
    for x in range(4):
        for y in range(4):
            picture.putpixel((x, y), (x, y, 255))
    picture.save(tmp_path / "one.png")
    pixels = ((patches_of(tmp_path / "one.png", 2) + 1) * 127.5).round().int()
    assert pixels.shape == (4, 12)
    assert pixels[1].view(4, 3).tolist() == [[2, 0, 255], [3, 0, 255], [2, 1, 255], [3, 1, 255]]


def test_a_resume_with_other_settings(tmp_path: Path):
    config = config_of(tmp_path, "out")
    RunFolder(config.run.out).begin(yaml.safe_dump(plain_values(config)))
    judge_folder(replace(config, run=replace(config.run, resume=True)), load_pretrain)
    other = config_of(tmp_path, "out", "run.resume=true", "replaced_token.weight=9.0")
    with pytest.raises(ValueError, match=r"replaced_token.weight=9.0, but the run in .* with 50.0"):
        judge_folder(other, load_pretrain)


def test_stages_that_cannot_be():
    process = SimpleNamespace(world_size=1)
    with pytest.raises(ValueError, match=r"zero_optimization.stage=3: helper and main model share"):
        _require_stage(3, process, None)  # type: ignore[arg-type]


def test_a_missing_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["pretrain", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_has_a_configuration_that_makes_its_module(name: str):
    config = load_pretrain(ROOT / "configs" / "pretrain" / f"{name}.yaml")
    assert isinstance(config.objective, OBJECTIVES[name])
    module = build_module(config, INPUTS, longest=48)
    helper = getattr(module, "helper", None)
    widths = {"replaced_token": 24, "multi_choice": 32}
    assert (None if helper is None else helper.body.config.hidden_size) == widths.get(name)
    shared = [p for n, p in module.named_parameters() if p.shape[0] == 271 and p.dim() == 2]
    assert len(shared) == 1, "one table of token embeddings"


def test_the_page_lists_every_key_as_it_is():
    text = (ROOT / "docs" / "objectives.md").read_text()
    assert text.partition(HEAD)[2].strip().splitlines() == list(rows(PretrainTree)), (
        "replace the table under 'Every key' in docs/objectives.md by what is printed by "
        "python -m tests.recipe.config.table_helper pretrain"
    )


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_ends_the_run(loss: float):
    run: Any = object.__new__(Pretraining)
    run.engine = SimpleNamespace(lr=1.0, run_step=lambda _: {"masked": loss})
    run.config = SimpleNamespace(objective=Masked())
    with pytest.raises(RuntimeError, match=f"step 3: the loss is {loss}; lower optimizer.lr"):
        run._train_step(3, [])
