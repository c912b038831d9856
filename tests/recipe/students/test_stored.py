"""A student's weights are read from its files by the names of its model, whatever the files say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from regate_ds.recipe.students.config import ModelConfig
from regate_ds.recipe.students.load import load_student
from regate_ds.recipe.students.stored import is_in_safetensors, source_of_student
from regate_ds.recipe.students.student import Student, save_student
from regate_ds.teacher.sharding.weights import WeightCut
from tests.support.tiny_students import make_llava

FILE = "model.safetensors"
QUERY = "model.language_model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(params=[False, True], ids=["own head", "tied head"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Student:
    student = make_llava(tie_word_embeddings=request.param)
    save_student(student, tmp_path)
    return student


def require_read(student: Student, folder: Path) -> None:
    """Every weight comes back, and a part of one."""
    empty, state = load_student(folder, weights=False), student.model.state_dict()
    found = source_of_student(empty, ModelConfig(path=folder))
    is_tied = student.model.config.tie_word_embeddings
    for name, weight in state.items():
        if name != "lm_head.weight" or not is_tied:
            assert torch.equal(found.read(name), weight), name
            assert found.shape(name) == tuple(weight.shape)
    assert torch.equal(found.read(QUERY, WeightCut(1, 3, 9)), state[QUERY][:, 3:9])


def rename(folder: Path, name_of: dict[str, str]) -> None:
    found: dict[str, Tensor] = {}
    for name, weight in load_file(folder / FILE).items():
        start = next(start for start in name_of if name.startswith(start))
        found[name_of[start] + name.removeprefix(start)] = weight
    save_file(found, folder / FILE, metadata={"format": "pt"})


def test_files_of_transformers_own_names_are_read(saved: Student, tmp_path: Path):
    require_read(saved, tmp_path)


def test_files_of_the_models_names_are_read(saved: Student, tmp_path: Path):
    own = {"vision": "model.vision", "multi": "model.multi", "language_model.lm_head": "lm_head"}
    rename(tmp_path, {**own, "language_model.model": "model.language_model"})
    require_read(saved, tmp_path)


def test_a_student_that_is_loaded_is_read_from_memory(saved: Student, tmp_path: Path):
    loaded = load_student(tmp_path)
    assert torch.equal(
        source_of_student(loaded, ModelConfig(path=Path("gone"))).read(QUERY),
        saved.model.state_dict()[QUERY],
    )


def test_a_missing_weight_is_named(saved: Student, tmp_path: Path):
    weights = load_file(tmp_path / FILE)
    del weights["multi_modal_projector.linear_1.bias"]
    save_file(weights, tmp_path / FILE, metadata={"format": "pt"})
    line = r"have no model.multi_modal_projector.linear_1.bias \(1 of \d+ are missing\); give the"
    with pytest.raises(ValueError, match=line):
        source_of_student(load_student(tmp_path, weights=False), ModelConfig(path=tmp_path))


def test_experts_are_read_one_by_one_and_a_missing_one_is_named(tmp_path: Path):
    experts = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
    student = make_llava(**experts)
    save_student(student, tmp_path)
    source = source_of_student(load_student(tmp_path, weights=False), ModelConfig(path=tmp_path))
    at = "model.language_model.layers.1.mlp.experts"
    gate_up = student.model.state_dict()[f"{at}.gate_up_proj"]
    assert torch.equal(source.read(f"{at}.1.up_proj.weight"), gate_up[1].chunk(2)[1])
    assert f"{at}.gate_up_proj" not in source
    weights = load_file(tmp_path / FILE)
    del weights["language_model.model.layers.1.block_sparse_moe.experts.1.w3.weight"]
    save_file(weights, tmp_path / FILE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"have no {at}\.1\.up_proj\.weight \(1 of"):
        source_of_student(load_student(tmp_path, weights=False), ModelConfig(path=tmp_path))


def test_only_safetensors_are_read_in_parts(saved: Student, tmp_path: Path):
    assert is_in_safetensors(ModelConfig(path=tmp_path))
    (tmp_path / FILE).rename(tmp_path / "pytorch_model.bin")
    assert not is_in_safetensors(ModelConfig(path=tmp_path))
