"""What `regate doctor --model` says of a checkpoint's configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.utils import is_torchvision_available

from regate_ds.recipe.doctor.model import examine_model
from tests.support.chat_students import save


def checkpoint(folder: Path, model_type: str, architecture: str) -> Path:
    """A folder that holds a configuration and no weights."""
    config = CONFIG_MAPPING[model_type](architectures=[architecture])
    config.save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    return folder


def found(folder: Path) -> dict[str, str]:
    return {check.name: check.found for check in examine_model(folder)}


@pytest.mark.parametrize(
    ("model_type", "architecture", "wanted"),
    [
        (
            "llama",
            "LlamaForCausalLM",
            {"model": "LlamaForCausalLM over llama", "regate train": "not possible"},
        ),
        (
            "llava",
            "LlavaForConditionalGeneration",
            {"model": "LlavaForConditionalGeneration over llama"},
        ),
        (
            "gemma3",
            "Gemma3ForConditionalGeneration",
            {
                "packed rows": "without images only",
                "flash_attention_2": "not possible",
            },
        ),
        (
            "qwen3_5",
            "Qwen3_5ForConditionalGeneration",
            {"packed rows": "not possible", "fla": "absent", "recurrent layers": "two executions"},
        ),
        (
            "aria",
            "AriaForConditionalGeneration",
            {"empty image": "not known", "image tokens": "not told apart"},
        ),
    ],
)
def test_what_a_configuration_tells(tmp_path, model_type: str, architecture: str, wanted: dict):
    result = found(checkpoint(tmp_path, model_type, architecture))
    assert wanted.items() <= result.items()
    if model_type in ("llama", "llava"):
        assert result == wanted


@pytest.mark.parametrize(
    ("model_type", "architecture", "message"),
    [
        ("gpt2", "GPT2LMHeadModel", "decoder 'gpt2' is not supported"),
        ("llama", "LlamaForSequenceClassification", "LlamaForSequenceClassification is not"),
    ],
)
def test_a_model_that_is_not_known_is_a_required_check_that_fails(
    tmp_path, model_type: str, architecture: str, message: str
):
    (check,) = examine_model(checkpoint(tmp_path, model_type, architecture))
    assert check.is_required
    assert not check.is_fine
    assert message in check.advice


def test_the_slow_convolution_of_torch_is_named(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path, "qwen3_vl", "Qwen3VLForConditionalGeneration")
    assert "torch" not in found(folder)
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    assert found(folder)["torch"] == "2.9.1"


@pytest.mark.parametrize("content", ["{", json.dumps({"model_type": "no_such_model"})])
def test_a_folder_without_a_readable_configuration_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="has no config.json that can be read") as caught:
        examine_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere holds no config.json; give the folder"):
        examine_model(tmp_path / "nowhere")


def test_what_attach_would_refuse_of_a_configuration_is_said(tmp_path):
    folder = checkpoint(tmp_path, "qwen3_moe", "Qwen3MoeForCausalLM")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "output_router_logits": True}))
    (check,) = examine_model(folder)
    assert not check.is_fine
    assert check.advice.startswith("output_router_logits=True asks for")


def test_the_chat_template_of_the_model_s_processor(tmp_path: Path):
    save("qwen2_5_vl", tmp_path)
    told = found(tmp_path)
    assert told["chat template"] == "that of its Qwen2_5_VLProcessor"
    assert ("videos" in told) != is_torchvision_available()
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", ""))
    (check,) = [each for each in examine_model(tmp_path) if each.name == "chat template"]
    assert (check.found, check.is_fine) == ("not usable", False)
    assert "no special token ends" in check.advice
