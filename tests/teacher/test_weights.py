"""Weights come tensor by tensor, or a part of one, from files or from a loaded model."""

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from regate_ds.teacher.sharding.weights import LoadedWeights, SavedWeights, WeightCut
from tests.support.models import causal_lm

NAME = "model.layers.0.mlp.up_proj.weight"
BIAS = "model.layers.1.self_attn.k_proj.bias"


@pytest.mark.parametrize("largest_file", ["1GB", "20KB"])
@pytest.mark.parametrize("loaded", [False, True])
def test_whole_tensors_and_parts_of_them_are_read(tmp_path, largest_file, loaded):
    model = causal_lm("qwen2")
    model.save_pretrained(tmp_path, max_shard_size=largest_file)
    weights = LoadedWeights(model.state_dict()) if loaded else SavedWeights(tmp_path)
    state: dict[str, Tensor] = model.state_dict()
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in state.items())
    assert torch.equal(weights.read(NAME, WeightCut(0, 3, 10)), state[NAME][3:10])
    assert torch.equal(weights.read(NAME, WeightCut(1, 3, 10)), state[NAME][:, 3:10])
    assert torch.equal(weights.read(BIAS, WeightCut(0, 2, 4)), state[BIAS][2:4])


def test_the_number_format_is_that_of_the_files(tmp_path):
    causal_lm().bfloat16().save_pretrained(tmp_path)
    assert SavedWeights(tmp_path).dtype == torch.bfloat16


def test_a_missing_tensor_is_named(tmp_path):
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"the weights in {tmp_path} have no {NAME}; give the"):
        SavedWeights(tmp_path).read(NAME)


def test_files_of_another_kind_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="holds neither model.safetensors nor .* safetensors; "):
        SavedWeights(tmp_path)


@pytest.mark.parametrize("length", [4, 5000])
def test_damaged_files_are_named_by_their_folder(tmp_path, length):
    causal_lm().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=f"the weights in {tmp_path} cannot be read"):
        SavedWeights(tmp_path).read(NAME)
