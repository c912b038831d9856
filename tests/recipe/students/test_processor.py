"""Students whose own processor writes the samples: which are, what their models get, what stays."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers.utils import is_torchvision_available

from regate_ds.data.chat.encode import ChatEncoder
from regate_ds.data.chat.vision import ProcessorVision
from regate_ds.data.collate import Collator, LoadedSample
from regate_ds.data.llava.encode import Encoder
from regate_ds.data.llava.template import Template
from regate_ds.families.table import PROCESSORS
from regate_ds.recipe.config.sections import DataConfig
from regate_ds.recipe.corpus import corpus_encoder
from regate_ds.recipe.students.load import load_student
from regate_ds.recipe.students.processor import chat_encoder
from regate_ds.recipe.students.student import save_student
from tests.support.chat_students import FIELDS, make_model, save
from tests.support.conversations import pictures_of, random_record, said
from tests.support.processors import MAKERS, can_make, processor
from tests.support.tiny_students import make_llava, make_qwen2_vl

DATA = DataConfig(train=Path("none.json"))


def write(path: Path, **fields: Any) -> None:
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**found, **fields}))


@pytest.mark.parametrize("name", [name for name in FIELDS if can_make(name)])
def test_a_model_gets_from_the_collator_what_its_processor_gives_it(name: str):
    own, patch = processor(name), MAKERS[name][2]
    encoder, vision = chat_encoder(own, patch, max_length=10_000), ProcessorVision(own, patch)
    model, random = make_model(name).eval(), Random(name)
    records = [random_record(random, n, num_images=n) for n in (2, 1)]
    loaded = [LoadedSample(encoder.encode(r), tuple(pictures_of(r))) for r in records]
    batch = Collator(pad_id=own.tokenizer.pad_token_id, vision=vision)(loaded)
    call = own.apply_chat_template(
        [said(record) for record in records],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "right"},
    )
    assert torch.equal(batch.inputs["input_ids"], call["input_ids"])
    with torch.no_grad():
        ours, theirs = model(**batch.inputs).logits, model(**call).logits
    is_real_BT = batch.tokens.segment_BT >= 0
    # The processor's call has a mask for the padding, and so takes another kernel.
    torch.testing.assert_close(ours[is_real_BT], theirs[is_real_BT], rtol=1e-3, atol=1e-4)


def test_every_processor_of_the_table_is_tried():
    assert {*FIELDS, "qwen3_vl_moe"} == set(PROCESSORS)
    assert {name.partition(",")[0] for name in MAKERS} == set(FIELDS)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    save("qwen2_vl", folder)
    return folder


def test_a_folder_with_a_chat_template_is_used_by_it_unless_a_template_is_given(qwen: Path):
    student = load_student(qwen)
    assert student.has_chat_template
    assert isinstance(corpus_encoder(student, DATA), ChatEncoder)
    own = load_student(qwen, own_template=True)
    assert not own.has_chat_template
    assert isinstance(corpus_encoder(own, DATA), Encoder)
    assert torch.equal(own.model.lm_head.weight, student.model.lm_head.weight)


def test_a_folder_that_names_no_processor_keeps_our_own_template(tmp_path: Path):
    save_student(make_qwen2_vl(), tmp_path)
    for _ in range(2):
        student = load_student(tmp_path)
        assert not student.has_chat_template
        settings = corpus_encoder(student, DATA).settings()
        assert settings["template"] == vars(Template())
        # As a tokenizer brings it that was trained for chats.
        (tmp_path / "chat_template.jinja").write_text("{{ messages }}")


def test_a_student_that_is_saved_has_its_processor_and_its_settings_for_videos(
    qwen: Path, tmp_path: Path
):
    videos = {"video_processor_type": "Qwen2VLVideoProcessor", "max_frames": 7}
    folder = tmp_path / "first"
    save("qwen2_vl", folder)
    write(folder / "processor_config.json", video_processor=videos)
    student = load_student(folder)
    save_student(student, tmp_path / "again")
    again = load_student(tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "processor_config.json").read_text())
    assert kept["video_processor"]["max_frames"] == 7
    record = random_record(Random(3), num_images=2)
    samples = [corpus_encoder(each, DATA).encode(record) for each in (student, again)]
    assert torch.equal(samples[0].input_ids_S, samples[1].input_ids_S)
    settings = [corpus_encoder(each, DATA).settings() for each in (student, again)]
    assert settings[0]["chat_template"] == settings[1]["chat_template"]


def test_settings_tell_another_template_or_processor(qwen: Path):
    student = load_student(qwen)
    before = corpus_encoder(student, DATA).settings()
    student.vision.processor.chat_template += "\n"
    assert corpus_encoder(student, DATA).settings() != before
    student.vision.processor.chat_template = before["chat_template"]
    assert corpus_encoder(student, DATA).settings() == before
    student.tokenizer.pad_token = "<|im_start|>"
    assert corpus_encoder(student, DATA).settings() != before, "a template may write any of them"
    student.tokenizer.pad_token = "<|endoftext|>"
    student.vision.processor.image_processor.merge_size = 4
    assert corpus_encoder(student, DATA).settings() != before
    json.dumps(before)


def test_a_family_without_our_own_template_needs_its_processors(tmp_path: Path):
    save("qwen2_5_vl", tmp_path)
    with pytest.raises(ValueError, match=r"by its processor's chat template alone; set data.temp"):
        load_student(tmp_path, own_template=True)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="alone; put its processor_config.json and chat_template"):
        load_student(tmp_path)


@pytest.mark.parametrize("name", [None, "FuyuProcessor"])
def test_a_processor_that_is_not_in_the_table_is_refused(tmp_path: Path, name: str | None):
    save("llava", tmp_path)
    if name is None:
        save_student(make_llava(), tmp_path)
        name = "LlavaProcessor"
        write(tmp_path / "config.json", model_type="vipllava")
        cause = "vipllava model; students are one of"
    else:
        write(tmp_path / "processor_config.json", processor_class=name)
        cause = "chat template of a FuyuProcessor over a llava model, .* .llava, qwen2_vl, internvl"
    with pytest.raises(ValueError, match=cause):
        load_student(tmp_path)


def test_a_processor_that_cannot_pad_is_refused_at_the_start(tmp_path: Path):
    save("qwen2_vl", tmp_path)
    write(tmp_path / "tokenizer_config.json", pad_token=None)
    with pytest.raises(ValueError, match="has no pad token, .* set pad_token in its tokenizer_con"):
        load_student(tmp_path)


def test_a_chat_template_of_null_is_none(tmp_path: Path):
    save("qwen2_vl", tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    write(tmp_path / "tokenizer_config.json", chat_template=None)
    assert not load_student(tmp_path).has_chat_template


def test_a_processor_that_cuts_samples_without_a_word_is_refused(tmp_path: Path):
    save("llava", tmp_path)
    write(tmp_path / "tokenizer_config.json", truncation=True, max_length=9)
    with pytest.raises(ValueError, match="has truncation=True, which cuts samples without a word"):
        load_student(tmp_path)


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llava_next_video", "LlavaNextVideoProcessor"),
        ("mistral3", "PixtralProcessor"),
        ("smolvlm", "SmolVLMProcessor"),
    ],
)
def test_a_processor_that_needs_torchvision_says_so(tmp_path: Path, model_type: str, name: str):
    save("idefics3", tmp_path)
    write(tmp_path / "config.json", model_type=model_type)
    write(tmp_path / "processor_config.json", processor_class=name)
    with pytest.raises(ValueError, match=f"the {name} in .* lacks a package .*orchvision") as one:
        load_student(tmp_path)
    assert "\n" not in str(one.value)
