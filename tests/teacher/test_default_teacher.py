"""The student's own text is its teacher: the host's losses, no weight copied, no tower."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from regate_ds.algorithm.loss import LogitChange
from regate_ds.teacher.backbone import text_backbone
from regate_ds.teacher.host_text import HostText
from regate_ds.teacher.identity import teacher_id
from regate_ds.teacher.scoring import score_samples
from regate_ds.teacher.throughput import plain_forward
from tests.families.run import TOLERANCE
from tests.families.teachers import teacher_error
from tests.families.zoo.fp64 import in_fp64
from tests.families.zoo.models.family import build
from tests.families.zoo.models.table import FAMILIES
from tests.support.planning import gate_layers
from tests.support.samples import make_samples

FEW = {
    "llava over granite": "its causal language model divides the logits, its host does not",
    "granite": "scaled logits",
    "paligemma over gemma2": "capped logits, two-way prefixes, scaled embeddings",
    "qwen3_vl": "three rotary axes and deepstack",
    "smolvlm": "the decoder is called text_model",
    "gpt_neox": "no host, and other names of decoder and head",
}


def host_of(name: str) -> Any:
    return build(FAMILIES[name], "eager").float().eval()


@pytest.mark.parametrize("name", FEW)
def test_the_losses_are_those_of_the_hosts_own_logits(name: str):
    with in_fp64():
        assert teacher_error(FAMILIES[name], "eager") <= TOLERANCE


def test_the_view_shares_storage_and_nothing_else():
    host = host_of("qwen3_vl")
    view = text_backbone(host).requires_grad_(False)
    assert isinstance(view, HostText)
    own = {weight.data_ptr() for weight in view.parameters()}
    decoder = [*host.get_decoder().parameters(), host.lm_head.weight]
    assert own == {weight.data_ptr() for weight in decoder}
    assert all(weight.requires_grad for weight in host.parameters())
    assert not {*view.modules()} & {*host.modules()}
    host.train()
    assert not any(module.training for module in view.modules())


def test_the_view_can_be_deleted_and_keeps_no_student_alive():
    host = host_of("qwen3_vl")
    view, before = text_backbone(host), host.lm_head.weight.clone()
    del view
    gc.collect()
    assert torch.equal(host.lm_head.weight, before)
    view, gone = text_backbone(host), weakref.ref(host)
    del host
    gc.collect()
    assert gone() is None
    assert bool(score_samples(view, make_samples(1), pad_id=0).isfinite().all())


@pytest.mark.parametrize("name", ["qwen3_vl", "smolvlm"])
def test_an_attached_student_has_the_same_teacher(name: str):
    host, samples = host_of(name), make_samples(4)
    wanted_N = score_samples(text_backbone(host), samples, pad_id=0)
    attachment = gate_layers(host, first_layer=1, last_layer=3)
    assert torch.equal(score_samples(text_backbone(host), samples, pad_id=0), wanted_N)
    attachment.remove()


def test_a_student_with_adapters_is_refused_in_one_line():
    host = host_of("llama")
    adapted = get_peft_model(host, LoraConfig(r=2, target_modules=["q_proj"]))
    for student in (adapted, adapted.get_base_model()):
        with pytest.raises(ValueError, match="make the teacher before they are added"):
            text_backbone(student)


def test_a_quantized_student_is_refused_in_one_line():
    host = host_of("llama")
    host.hf_quantizer = object()  # as from_pretrained leaves one
    with pytest.raises(ValueError, match="is quantized, and a teacher of its weights would read"):
        text_backbone(host)


def test_a_host_that_was_cast_has_a_teacher_with_an_exact_rotary_table():
    host = host_of("qwen3_vl")
    table = host.get_decoder().rotary_emb.inv_freq.clone()
    view = text_backbone(host.bfloat16())
    assert torch.equal(view.model.rotary_emb.inv_freq, table)
    assert view.lm_head.weight.dtype == torch.bfloat16


def test_what_is_done_to_the_logits_is_part_of_the_teachers_name():
    view: Any = text_backbone(host_of("aya_vision"))
    name = teacher_id(view, pad_id=0)
    assert name == teacher_id(text_backbone(host_of("aya_vision")), pad_id=0)
    view.config.logit_change = {"scale": 0.4, "cap": None}
    assert teacher_id(view, pad_id=0) != name


def test_all_logits_of_a_host_are_changed_as_its_losses_are():
    view = HostText(_Constant, _Config(), LogitChange(scale=2.0, cap=3.0), nn.Linear(4, 7))
    logits_BTV = view(input_ids=torch.zeros(1, 2).long(), use_cache=False).logits
    plain_BTV = view.lm_head(torch.ones(1, 2, 4))
    torch.testing.assert_close(logits_BTV, 3.0 * torch.tanh(2.0 * plain_BTV / 3.0))


class _Config:
    pass


class _Constant(nn.Module):
    """A decoder whose hidden states are ones."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(last_hidden_state=torch.ones(*input_ids.shape, 4))


def test_the_speed_of_such_a_teacher_is_measured_like_that_of_others():
    assert plain_forward(text_backbone(host_of("qwen3_vl")), make_samples(2), pad_id=0).numel() == 2
