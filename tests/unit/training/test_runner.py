"""Which folders are taken for a teacher."""

from types import SimpleNamespace

import pytest
import torch
from tiny_students import make_llava
from transformers import GPT2Config, GPT2LMHeadModel

from regate_ds.teacher.text_only import score_samples
from regate_ds.training.runner import load_teacher, tell_cut
from regate_ds.training.student import save_student
from tests.models import causal_lm
from tests.samples import make_index, make_samples


def test_a_saved_causal_model_is_a_teacher(tmp_path):
    model = causal_lm()
    model.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path)
    assert not teacher.training
    assert torch.equal(teacher.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("name", ["nowhere", "config.json"])
def test_what_is_not_a_models_folder_is_refused(tmp_path, name):
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match=f"teacher.path=.*{name}: holds no config.json; give"):
        load_teacher(tmp_path / name)


def test_a_model_with_images_is_not_a_causal_one(tmp_path):
    save_student(make_llava(), tmp_path)
    with pytest.raises(ValueError, match="is a llava model, not a causal language model; give"):
        load_teacher(tmp_path)


def test_a_damaged_weights_file_is_named_by_its_folder(tmp_path):
    causal_lm().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"the weights in {tmp_path} cannot be read"):
        load_teacher(tmp_path)


def test_a_decoder_of_another_build_cannot_score(tmp_path):
    config = GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use a teacher built like Llama"):
        score_samples(load_teacher(tmp_path), make_samples(1), pad_id=1)


def test_samples_that_fill_the_length_are_told(capsys):
    task = SimpleNamespace(index=make_index(9))
    longest = int(task.index.num_positions.max())
    tell_cut(task, longest + 1)  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""
    tell_cut(task, longest)  # type: ignore[arg-type]
    assert f"2 of 9 training samples fill data.max_length={longest}" in capsys.readouterr().out
