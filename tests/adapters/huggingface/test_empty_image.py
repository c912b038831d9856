"""A micro-batch without an image runs the vision tower all the same, and changes nothing by it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from regate_ds.adapters.huggingface.tower_calls import TowerCalls, calls_beside
from regate_ds.data.collate import Batch
from tests.adapters.huggingface.gated_cases_helper import Case, text_case
from tests.adapters.huggingface.test_oracle_images import PATCH_GRIDS, llava_case, qwen2_vl_case
from tests.support.measure import gradients
from tests.support.models import causal_lm, llava, qwen2_vl
from tests.support.planning import gate_layers

TEXT = text_case([[20], [13], [7]])
MODELS = {
    "llava": (llava, lambda: llava_case([[20], [13]], [1, 1])),
    "qwen2_vl": (qwen2_vl, lambda: qwen2_vl_case([20, 15], PATCH_GRIDS)),
}


@pytest.fixture(params=MODELS)
def family(request):
    """(make a model, make a case with images)"""
    return MODELS[request.param]


def attached(make, **knobs) -> nn.Module:
    model = make()
    gate_layers(model, **{"run_tower_without_image": True, **knobs})
    return model


def calls_of_tower(model: nn.Module) -> list[str]:
    """Grows by the tower's class with every call of it."""
    calls = []
    tower = model.model.vision_tower if hasattr(model.model, "vision_tower") else model.model.visual
    tower.register_forward_pre_hook(lambda module, args: calls.append(type(module).__name__))
    return calls


@pytest.mark.parametrize("case", [TEXT, TEXT.dense, text_case([[9, 11], [13]])])
def test_text_alone_reaches_every_weight_of_the_tower_with_a_gradient_of_zero(family, case: Case):
    make, with_images = family
    if case.plan.is_packed and make is qwen2_vl:
        # Text positions, and those of the three axes.
        positions = case.inputs["position_ids"].expand(4, -1, -1)
        case = replace(case, inputs={"position_ids": positions})
    model, plain, seeing = attached(make), attached(make, run_tower_without_image=False), make()
    found, wanted = case.run(model).loss_sum, case.run(plain).loss_sum
    assert torch.equal(found, wanted)
    found.backward()
    wanted.backward()
    found, wanted = gradients(model), gradients(plain)
    gate_layers(seeing)
    with_images().run(seeing).loss_sum.backward()
    assert found.keys() == gradients(seeing).keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not any(bool(found[name].any()) for name in found.keys() - wanted.keys())


def test_images_of_the_micro_batch_before_leave_text_alone_as_it_is(family):
    make, with_images = family
    model, plain = attached(make), attached(make, run_tower_without_image=False)
    with_images().run(model)
    for rows in ([[20]], [[20], [13], [7]]):
        case = text_case(rows)
        assert torch.equal(case.run(model).loss_sum, case.run(plain).loss_sum)


def test_a_micro_batch_with_images_runs_the_tower_once(family):
    make, with_images = family
    model = attached(make)
    calls = calls_of_tower(model)
    with_images().run(model)
    assert len(calls) == 1


def test_a_micro_batch_with_videos_runs_the_tower_once():
    model, case = attached(qwen2_vl), qwen2_vl_case([20, 15], PATCH_GRIDS)
    model.config.video_token_id, model.config.image_token_id = model.config.image_token_id, 0
    inputs = {
        "pixel_values_videos": case.inputs["pixel_values"],
        "video_grid_thw": case.inputs["image_grid_thw"],
        "mm_token_type_ids": 2 * case.inputs["mm_token_type_ids"],
    }
    calls = calls_of_tower(model)
    replace(case, inputs=inputs).run(model)
    assert len(calls) == 1


def test_without_a_plan_the_tower_does_not_run(family):
    make, _ = family
    model = attached(make)
    calls = calls_of_tower(model)
    model(input_ids=TEXT.input_ids)
    assert calls == []


def test_a_text_model_has_no_tower_to_run():
    model, plain = attached(causal_lm), attached(causal_lm, run_tower_without_image=False)
    assert torch.equal(TEXT.run(model).loss_sum, TEXT.run(plain).loss_sum)


@pytest.mark.parametrize("agreed", [("image",) * 2, ("image",) * 3])
def test_further_calls_of_the_tower_change_nothing(family, agreed):
    make, with_images = family
    model, plain = attached(make), attached(make)
    for case in (with_images(), text_case([[20], [13]])):
        inputs = {**case.inputs, "regate_tower": agreed}
        calls = calls_of_tower(model)
        found, wanted = replace(case, inputs=inputs).run(model), case.run(plain)
        assert len(calls) == len(agreed)
        assert torch.equal(found.loss_sum, wanted.loss_sum)
        found.loss_sum.backward()
        wanted.loss_sum.backward()
    assert "get_image_features" not in vars(model.model)
    found, wanted = gradients(model), gradients(plain)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], each) for name, each in wanted.items())


def test_a_micro_batch_with_more_calls_than_planned_is_named():
    model, case = attached(qwen2_vl), qwen2_vl_case([20, 15], PATCH_GRIDS)
    videos = {"pixel_values_videos": case.inputs["pixel_values"], "regate_tower": ("image",)}
    with pytest.raises(ValueError, match="has image and video inputs, but when it was planned"):
        replace(case, inputs={**case.inputs, **videos}).run(model)


IMAGES, VIDEOS = ("image",), ("video",)


@pytest.mark.parametrize(
    ("ranks", "by_count", "by_kind"),
    [
        ((IMAGES + VIDEOS, IMAGES), IMAGES + IMAGES, IMAGES + VIDEOS),
        ((IMAGES, VIDEOS), IMAGES, IMAGES + VIDEOS),
        ((VIDEOS, VIDEOS), IMAGES, VIDEOS),
        ((VIDEOS, ()), IMAGES, VIDEOS),
        (((), ()), IMAGES, IMAGES),
        ((IMAGES + VIDEOS, IMAGES + VIDEOS), IMAGES + IMAGES, IMAGES + VIDEOS),
    ],
)
def test_ranks_agree_on_the_calls_of_each_micro_batch(ranks, by_count, by_kind):
    names = {"image": "pixel_values", "video": "pixel_values_videos"}
    tokens = TEXT.batch
    micro = [[Batch({names[kind]: 1 for kind in kinds}, tokens)] for kinds in ranks]
    for calls, wanted in (
        (TowerCalls(several=True), by_count),
        (TowerCalls(several=True, by_kind=True), by_kind),
    ):
        sums = [sum(each) for each in zip(*(calls.tally(one) for one in micro))]
        assert calls.agreed(sums, len(ranks)) == (wanted,)
        for kinds in ranks:
            beside = calls_beside(kinds, wanted)
            assert len(kinds) + len(beside) == len(wanted)
            assert not calls.by_kind or sorted(kinds + beside) == sorted(wanted)


def test_ranks_that_need_not_agree_exchange_nothing():
    assert TowerCalls().tally([Batch({"pixel_values": 1}, TEXT.batch)]) == []
    assert TowerCalls().agreed([], 2) == ()


@pytest.mark.parametrize(
    ("stage", "num_ranks", "wanted"),
    [
        (0, 2, TowerCalls()),
        (3, 1, TowerCalls()),
        (2, 2, TowerCalls(hears=True)),
        (3, 2, TowerCalls(several=True, hears=True)),
    ],
)
def test_what_ranks_agree_on_under_a_stage(stage: int, num_ranks: int, wanted: TowerCalls):
    assert TowerCalls(several=True, hears=True).under(stage, num_ranks) == wanted
    by_kind = TowerCalls(several=True, by_kind=True)
    assert by_kind.under(stage, num_ranks) == (by_kind if wanted.hears else TowerCalls())


SOUND, PICTURE = "input_features", "image_pixel_values"


@pytest.mark.parametrize(
    ("first", "second", "fault"),
    [
        ((SOUND,), (SOUND,), None),
        ((), (PICTURE,), None),
        ((SOUND,), (), "^in micro-batch 1 of the step 1 of 2 data ranks have audio"),
        ((SOUND, PICTURE), (SOUND,), "1 of 2 data ranks have images beside their audio"),
    ],
)
def test_audio_on_some_ranks_is_refused_on_all(first, second, fault):
    calls = TowerCalls(hears=True, hears_by_image=True)
    steps = [
        [Batch(dict.fromkeys(names, 1), TEXT.batch) for names in ((), own)]
        for own in (first, second)
    ]
    sums = [sum(each) for each in zip(*(calls.tally(one) for one in steps))]
    if fault is None:
        assert calls.agreed(sums, 2) == ()
        return
    with pytest.raises(ValueError, match=fault):
        calls.agreed(sums, 2)


def test_images_and_videos_in_one_micro_batch_are_refused_where_ranks_did_not_agree():
    model, case = attached(qwen2_vl), qwen2_vl_case([20, 15], PATCH_GRIDS)
    videos = {"pixel_values_videos": case.inputs["pixel_values"]}
    both = replace(case, inputs={**case.inputs, **videos})
    # As ZeRO-3 marks the parameters that it cuts.
    model.lm_head.weight.ds_id = 0
    case.run(model)
    with pytest.raises(ValueError, match="images and videos: under ZeRO-3.*regate_tower too"):
        both.run(model)
    model.config.model_type = "another"
    with pytest.raises(ValueError, match="image of a another model is not known"):
        both.run(model)
