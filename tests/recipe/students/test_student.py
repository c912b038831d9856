import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from regate_ds.families.table import family_of
from regate_ds.recipe.doctor.model import examine_model
from regate_ds.recipe.students.config import LoraConfig, ModelConfig
from regate_ds.recipe.students.llava import build_llava
from regate_ds.recipe.students.load import load_student, make_student
from regate_ds.recipe.students.student import save_student
from regate_ds.recipe.students.trainable import adapter_starts, trainable
from regate_ds.teacher.backbone import text_backbone
from regate_ds.teacher.loading import load_teacher, load_teacher_config
from tests.support.tiny_students import (
    CLIP,
    STUDENTS,
    TEXT,
    make_image,
    make_llava,
    make_qwen2_vl,
    make_tokenizer,
)

each_student = pytest.mark.parametrize("make", STUDENTS.values(), ids=STUDENTS.keys())


def image_inputs(student, num_words=4):
    """One row: an image and a few words."""
    image = make_image()
    count = student.vision.num_tokens(image.size)
    ids = [0] + [student.model.config.image_token_id] * count + list(range(8, 8 + num_words))
    ids_BT = torch.tensor([ids])
    is_image_BT = ids_BT == student.model.config.image_token_id
    extra = student.vision.extra_inputs(ids_BT, is_image_BT)
    return {"input_ids": ids_BT, **extra, **student.vision.pixels([image])}


@each_student
def test_text_backbone_gives_the_students_logits_on_text(make):
    student = make()
    ids_BT = torch.randint(4, len(student.tokenizer), (2, 9), generator=torch.manual_seed(0))
    with torch.no_grad():
        wanted = student.model.eval()(input_ids=ids_BT).logits
        got = text_backbone(student.model)(input_ids=ids_BT).logits
    assert torch.equal(got, wanted)


@each_student
def test_text_backbone_takes_plain_positions_and_a_mask(make):
    student = make()
    view = text_backbone(student.model)
    ids_BT = torch.randint(4, len(student.tokenizer), (1, 9), generator=torch.manual_seed(0))
    mask_BT = torch.ones_like(ids_BT)
    with torch.no_grad():
        wanted = view(input_ids=ids_BT).logits
        got = view(
            input_ids=ids_BT, attention_mask=mask_BT, position_ids=torch.arange(9)[None]
        ).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@each_student
def test_text_backbone_shares_weights_but_not_the_wish_to_train_them(make):
    student = make()
    view = text_backbone(student.model).requires_grad_(False)
    embedding = student.model.get_input_embeddings().weight
    assert embedding.requires_grad
    assert view.get_input_embeddings().weight.data_ptr() == embedding.data_ptr()
    assert view.lm_head.weight.data_ptr() == student.model.lm_head.weight.data_ptr()


def test_text_backbone_of_a_tied_student_has_head_and_embedding_in_one():
    tokenizer = make_tokenizer()
    text = {**TEXT, "tie_word_embeddings": True}
    student = build_llava(tokenizer, text=text, vision=CLIP, seed=0)
    view = text_backbone(student.model)
    assert view.lm_head.weight is view.get_input_embeddings().weight
    assert view.lm_head.weight.data_ptr() == student.model.lm_head.weight.data_ptr()


@each_student
def test_a_frozen_tower_is_left_out_of_training_and_the_rest_is_not(make, tmp_path):
    student = make()
    tower = {id(p) for p in family_of(student.model).tower_of(student.model).parameters()}
    assert 0 < len(tower) < len(list(student.model.parameters()))
    model = trainable(student, ModelConfig(path=tmp_path, freeze_vision=True), seed=0)
    for weight in model.parameters():
        assert weight.requires_grad == (id(weight) not in tower)


def test_making_the_text_backbone_leaves_the_random_state_alone():
    student = make_llava()
    before = torch.get_rng_state()
    text_backbone(student.model)
    assert torch.equal(torch.get_rng_state(), before)


@each_student
def test_a_saved_student_is_loaded_bit_for_bit(make, tmp_path):
    student = make()
    save_student(student, tmp_path)
    loaded = load_student(tmp_path)
    inputs = image_inputs(student)
    with torch.no_grad():
        wanted = student.model.eval()(**inputs).logits
        got = loaded.model.eval()(**image_inputs(loaded)).logits
    assert torch.equal(got, wanted)
    assert loaded.image_token == "<image>"
    assert loaded.tokenizer.get_vocab() == student.tokenizer.get_vocab()
    assert (tmp_path / "model.safetensors").is_file()


@each_student
def test_the_image_changes_the_logits_of_the_words_after_it(make):
    student = make()
    inputs = image_inputs(student)
    with torch.no_grad():
        one = student.model.eval()(**inputs).logits
        other = student.model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
    assert (one - other)[0, -1].abs().max() > 1e-3


def test_qwen2_vl_gives_image_tokens_positions_on_two_axes():
    student = make_qwen2_vl()
    inputs = image_inputs(student)
    position_3BT, _ = student.model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
    )
    assert position_3BT[1, 0, 1:10].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert position_3BT[2, 0, 1:10].tolist() == [1, 2, 3, 1, 2, 3, 1, 2, 3]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    def build(seed):
        text = {"model_type": "llama", **TEXT}
        return build_llava(make_tokenizer(), text=text, vision=CLIP, seed=seed).model

    one, same, other = build(1), build(1), build(2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters()))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_an_image_token_the_tokenizer_lacks_is_refused_by_name():
    text = {"model_type": "llama", **TEXT}
    with pytest.raises(ValueError, match="no token '<picture>'"):
        build_llava(make_tokenizer(), text=text, vision=CLIP, seed=0, image_token="<picture>")


def test_a_folder_without_a_model_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_student(tmp_path)


@pytest.mark.parametrize("read", [load_student, load_teacher, load_teacher_config, examine_model])
@pytest.mark.parametrize("has_config", [False, True])
def test_a_folder_of_adapters_is_refused_by_name(tmp_path, read, has_config):
    """Beside a whole model they would hide the weights that this lacks."""
    adapted = trainable(make_llava(), ModelConfig(path=tmp_path, lora=LoraConfig()), seed=0)
    if has_config:
        save_student(make_llava(), tmp_path)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds adapters of PEFT \(adapter_config\.json\).*merge"):
        read(tmp_path)


def test_a_model_that_is_no_student_is_refused_by_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="is a gpt2 model; students are one of"):
        load_student(tmp_path)


def adapters(tmp_path, **lora):
    config = ModelConfig(path=tmp_path, lora=LoraConfig(rank=2, **lora))
    model = trainable(make_llava(), config, seed=3)
    return {name: weight for name, weight in model.named_parameters() if "lora_" in name}


def test_adapters_get_their_weights_from_the_runs_seed_alone(tmp_path):
    found = []
    for ambient in (1, 2):
        torch.manual_seed(ambient)
        found.append(adapters(tmp_path))
        assert torch.initial_seed() == ambient
    first, second = found
    assert first
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_adapters_that_are_drawn_one_by_one_are_pefts(tmp_path):
    wanted = adapters(tmp_path, target_modules=("q_proj", "down_proj"))
    lora = LoraConfig(rank=2, target_modules=("q_proj", "down_proj"))
    student = make_llava()
    student.model.to("meta")
    found = dict(adapter_starts(student, lora, seed=3))
    assert len(found) == len(wanted) / 2 > 0
    for name, start in found.items():
        assert torch.equal(wanted[f"base_model.model.{name}.lora_A.default.weight"], start)
        assert not wanted[f"base_model.model.{name}.lora_B.default.weight"].any()


@pytest.mark.parametrize("target", ["qkv_proj", "self_attn", "q.proj"])
def test_an_adapters_target_that_the_model_lacks_is_named(tmp_path, target):
    with pytest.raises(ValueError, match=f"no linear layer '{target}'; it has .*k_proj, o_proj"):
        adapters(tmp_path, target_modules=("q_proj", target))


def test_damaged_weights_are_named_by_their_folder(tmp_path):
    save_student(make_llava(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"the weights in {tmp_path} cannot be read"):
        load_student(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_a_damaged_tokenizer_or_processor_is_named_by_its_folder(tmp_path, name):
    save_student(make_llava(), tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=f"{tmp_path}.* cannot be read .*JSONDecodeError"):
        load_student(tmp_path)


def test_weights_that_a_students_folder_lacks_are_named(tmp_path):
    save_student(make_llava(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (name,) = (name for name in weights if name.endswith("linear_1.weight"))
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=f"the weights in {tmp_path} lack .*linear_1.weight of the"
    ):
        load_student(tmp_path)


@pytest.mark.parametrize(
    ("kind", "text", "vision", "message"),
    [
        ("llava", {}, {"image_size": None}, r"model.vision.image_size is missing"),
        ("llava", {}, {"image_size": "big"}, r"model.vision.image_size='big': must be a whole"),
        ("llava", {"hidden_size": "wide"}, {}, "transformers makes no model of .*hidden_size"),
        ("qwen2_vl", {}, {}, "model.vision.max_pixels is missing"),
    ],
)
def test_a_fresh_students_wrong_keys_are_named(tmp_path, kind, text, vision, message):
    make_tokenizer().save_pretrained(tmp_path)
    vision = {k: v for k, v in {**CLIP, **vision}.items() if v is not None}
    config = ModelConfig(
        kind=kind, tokenizer=tmp_path, text={"model_type": "llama", **TEXT, **text}, vision=vision
    )
    with pytest.raises(ValueError, match=message):
        make_student(config, seed=0)
