"""Which folders and files are taken for a teacher, and that a GGUF file is the model it is of."""

import importlib.util
import json
import re
import struct
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from regate_ds.recipe.students.student import save_student
from regate_ds.recipe.tasks.pretraining.tokenizer import train_tokenizer
from regate_ds.teacher.identity import teacher_id
from regate_ds.teacher.loading import load_teacher, load_teacher_config, load_teacher_tokenizer
from regate_ds.teacher.scoring import score_samples
from regate_ds.teacher.sharding.placement import TeacherSource, id_of_source, weights_of
from regate_ds.teacher.sharding.weights import SavedWeights
from regate_ds.teacher.tokenizers.same import require_same_tokens
from tests.support.gguf_files import write_gguf
from tests.support.models import causal_lm
from tests.support.samples import make_samples
from tests.support.tiny_students import make_llava

TEXTS = ["The number seven is red.", "The number two is red, it is small."] * 3


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


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_model_without_a_tokenizer_is_named(tmp_path, kind):
    causal_lm(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"teacher.path={tmp_path}: holds no tokenizer; put the"):
        load_teacher_tokenizer(tmp_path)


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


def test_weights_that_are_missing_are_named_and_not_drawn_at_random(tmp_path):
    causal_lm().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lacking = [name for name in sorted(weights) if "layers.0" in name]
    kept = {name: weight for name, weight in weights.items() if name not in lacking}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    told = (
        f"{', '.join(lacking[:3])} and {len(lacking) - 3} more of the model, which would be random"
    )
    with pytest.raises(ValueError, match=re.escape(f"the weights in {tmp_path} lack {told}")):
        load_teacher(tmp_path)


def test_weights_of_another_size_are_named(tmp_path):
    causal_lm(vocab_size=40).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 48}))
    told = "do not fit its config, such as lm_head.weight [40, 32] for [48, 32], model.embed"
    with pytest.raises(ValueError, match=re.escape(f"the weights in {tmp_path} {told}")):
        load_teacher(tmp_path)


def test_a_decoder_of_another_build_cannot_score(tmp_path):
    config = GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use a teacher built like Llama"):
        score_samples(load_teacher(tmp_path), make_samples(1), pad_id=1)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=280)


@pytest.fixture(scope="module")
def model(tokenizer):
    return causal_lm(vocab_size=len(tokenizer), hidden_size=64).eval()


@pytest.fixture(scope="module")
def gguf(tmp_path_factory, model, tokenizer) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(model, tokenizer, path)
    return path


def test_a_gguf_files_losses_are_those_of_the_model_it_was_made_of(gguf, model):
    samples = make_samples(4)
    loaded = load_teacher(gguf)
    expected_N = score_samples(model, samples, pad_id=1)
    assert torch.equal(score_samples(loaded, samples, pad_id=1), expected_N)


def test_a_gguf_files_tokenizer_reads_as_the_one_it_was_made_of(gguf, tokenizer):
    loaded = load_teacher_tokenizer(gguf)
    require_same_tokens(tokenizer, loaded, placeholder_ids=[3])
    for text in ["The number nine, \u00fc \U0001f600", "  is\n\n red"]:
        one, other = (t(text, add_special_tokens=False) for t in (loaded, tokenizer))
        assert one["input_ids"] == other["input_ids"]
    assert (loaded.eos_token_id, loaded.bos_token_id) == (1, 0)


def test_a_gguf_file_that_tells_of_fewer_weights_is_refused(gguf, tmp_path):
    content = bytearray(gguf.read_bytes())
    number = int.from_bytes(content[8:16], "little")
    # Without the last one, the head, the embedding is the head too.
    content[8:16] = (number - 2).to_bytes(8, "little")
    (tmp_path / "fewer.gguf").write_bytes(content)
    with pytest.raises(
        ValueError, match="the weights in .*fewer.gguf lack model.norm.weight of the"
    ):
        load_teacher(tmp_path / "fewer.gguf")


def test_a_gguf_file_that_tells_of_more_layers_than_tensors_is_refused(gguf, tmp_path):
    content = bytearray(gguf.read_bytes())
    name = b"llama.block_count"
    at = content.index(name) + len(name) + 4
    content[at : at + 4] = (1 << 30).to_bytes(4, "little")
    (tmp_path / "layers.gguf").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"layers.gguf: tells of 1073741824 layers but of \d+ tens"
    ):
        load_teacher(tmp_path / "layers.gguf")


def test_a_gguf_teacher_is_named_by_its_weights_not_its_file(gguf, tmp_path):
    copy = tmp_path / "other_name.gguf"
    copy.write_bytes(gguf.read_bytes())
    loaded = load_teacher(copy)
    assert teacher_id(loaded, pad_id=1) == teacher_id(load_teacher(gguf), pad_id=1)
    loaded.save_pretrained(tmp_path / "folder")
    again = load_teacher(tmp_path / "folder")
    assert teacher_id(again, pad_id=1) == teacher_id(loaded, pad_id=1)


def test_a_gguf_teacher_that_is_cut_has_the_name_of_the_whole(gguf):
    source = TeacherSource(load_teacher_config(gguf), partial(load_teacher, gguf))
    found = id_of_source(source, weights_of(source), 1)
    assert found == teacher_id(load_teacher(gguf), pad_id=1)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
@pytest.mark.parametrize("load", [load_teacher, load_teacher_tokenizer])
def test_a_missing_package_is_named_with_the_way_to_get_it(gguf, monkeypatch, load, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else found(name)
    )
    with pytest.raises(ImportError, match=rf"need {package}; .*pip install 'regate-ds\[gguf\]'"):
        load(gguf)


def test_a_gguf_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"teacher\.path=.*none\.gguf: no such file"):
        load_teacher(tmp_path / "none.gguf")


def test_a_folder_with_a_gguf_file_is_told_apart_from_the_file(gguf):
    with pytest.raises(ValueError, match=r"a GGUF file \(small\.gguf is here\)"):
        load_teacher(gguf.parent)


@pytest.mark.parametrize("content", [b"no gguf at all", b"", None])
def test_a_damaged_gguf_file_is_one_line_that_names_it(gguf, tmp_path, content):
    path = tmp_path / "bad.gguf"
    path.write_bytes(gguf.read_bytes()[:3000] if content is None else content)
    with pytest.raises(ValueError, match=r"teacher\.path=.*bad\.gguf: cannot be read") as error:
        load_teacher(path)
    assert "\n" not in str(error.value)


def test_a_gguf_file_whose_merges_make_no_token_is_one_line_that_names_it(gguf, tmp_path):
    # The library of tokenizers raises an Exception of no type.
    content = gguf.read_bytes()
    token = struct.pack("<Q", 3) + b"red"
    assert token in content
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content.replace(token, struct.pack("<Q", 3) + b"xxx", 1))
    with pytest.raises(ValueError, match=r"damaged.gguf: cannot be read \(Exception: .*`red`"):
        load_teacher_tokenizer(damaged)


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda text: text[: len(text) // 2], "JSONDecodeError"),
        (lambda text: text.replace(b"trim_offsets", b"trim_offset"), "Exception: missing field"),
        (lambda text: text.replace(b"red", b"\xff\xfe\xff", 1), "UnicodeDecodeError"),
    ],
)
def test_a_damaged_tokenizer_is_named_by_its_folder(tmp_path, tokenizer, damage, cause):
    causal_lm().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{tmp_path}: cannot be read by \w+ \({cause}"):
        load_teacher_tokenizer(tmp_path)


def test_sizes_that_make_no_model_are_named_by_their_folder(tmp_path):
    causal_lm().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_attention_heads": 7}))
    for load in (load_teacher, load_teacher_config, load_teacher_tokenizer):
        with pytest.raises(ValueError, match=f"{tmp_path}: cannot be read by AutoConfig") as error:
            load(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "loads"),
    [
        ("{", (load_teacher, SavedWeights)),
        ("[]", (SavedWeights,)),
        ('{"weight_map": 3}', (SavedWeights,)),
    ],
)
def test_a_damaged_index_of_the_weights_is_named_by_its_folder(tmp_path, content, loads):
    causal_lm().save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    for load in loads:
        with pytest.raises(ValueError, match=f"the weights in {tmp_path} cannot be read"):
            load(tmp_path)
