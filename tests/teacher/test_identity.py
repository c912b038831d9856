"""A teacher's name follows from what decides its losses."""

import torch

from regate_ds.teacher.identity import teacher_id
from tests.support.models import causal_lm


def test_where_a_teacher_lies_and_who_saved_it_does_not_change_its_name():
    one, other = causal_lm(), causal_lm()
    other.config._name_or_path = "/elsewhere"
    other.config.transformers_version = "0.0"
    other.config.architectures = ["Other"]
    other.config.use_cache = False
    assert teacher_id(one, pad_id=1) == teacher_id(other, pad_id=1)


def test_weights_settings_and_the_token_for_images_change_a_teachers_name():
    names = {teacher_id(causal_lm(), pad_id=pad_id) for pad_id in (1, 2)}
    trained, other = causal_lm(), causal_lm()
    with torch.no_grad():
        trained.lm_head.weight[3, 3] += 1
    other.config.rms_norm_eps = 0.5
    assert len(names | {teacher_id(model, pad_id=1) for model in (trained, other)}) == 4
