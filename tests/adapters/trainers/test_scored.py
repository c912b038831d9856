"""The teacher that a Trainer makes of its student, where the student has adapters of PEFT."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from regate_ds.adapters.trainers.scored import Scored, _own_teacher
from regate_ds.teacher.backbone import text_backbone
from tests.support.tiny_students import make_llava, make_tokenizer

TARGETS = r".*language_model.*(q_proj|up_proj)"


def adapted(**knobs: Any) -> SimpleNamespace:
    """A Trainer of a student with adapters, as far as the teacher asks."""
    config = LoraConfig(r=4, target_modules=TARGETS, **{"init_lora_weights": False, **knobs})
    model = get_peft_model(make_llava().model, config)
    return SimpleNamespace(model=model, processing_class=make_tokenizer())


@pytest.mark.parametrize("knobs", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_it_is_the_student_without_its_adapters_on_the_same_weights(knobs: dict[str, Any]):
    ids_1T = torch.arange(4, 18)[None]
    trainer = adapted(**knobs)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    teacher: Any = _own_teacher(trainer).model
    assert torch.equal(teacher(ids_1T).logits, text_backbone(make_llava().model)(ids_1T).logits)
    layers = trainer.model.get_base_model().get_decoder().layers
    shared = layers[0].self_attn.q_proj.base_layer.weight
    assert teacher.model.layers[0].self_attn.q_proj.weight.data_ptr() == shared.data_ptr()
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == trained


def test_weights_that_adapters_have_changed_are_no_teacher(tmp_path: Path):
    with pytest.raises(ValueError, match="init_lora_weights='pissa' has changed its weights"):
        Scored(tmp_path).compute(adapted(init_lora_weights="pissa"), None, None, None)
