"""One case for each way in which a family's layers differ, against the zoo's oracle in fp64."""

from __future__ import annotations

from typing import Any

import pytest

from tests.families.ranks_alone import empty_image
from tests.families.run import TOLERANCE, attached
from tests.families.zoo.cases import Case, cases_of
from tests.families.zoo.compare import attached_run, gradient_error, loss_error, oracle_run
from tests.families.zoo.fp64 import in_fp64
from tests.families.zoo.models.family import build
from tests.families.zoo.models.table import FAMILIES

BY_HOOK = {
    "its own mask: image tokens see each other, windows, rotary by layer type": "gemma3",
    "its own mask: a prefix; scaled and capped logits; eager": "paligemma over gemma2",
    "a window, and logits that are scaled": "cohere2",
    "a window in layers that are not called so, beside a recurrence": "minimax, window",
    "tokens' positions as a layer input": "ministral3",
    "tokens' own inputs; arguments without a name": "gemma4",
    "one complex rotary table": "deepseek_v2",
    "no rotary table in some layers": "lfm3",
    "a recurrence": "qwen3_5_text",
    "features of the image between layers": "qwen3_vl",
    "experts": "qwen3_moe",
}


def made(name: str, case_name: str, attention: str = "") -> tuple[Any, Case]:
    family = FAMILIES[name]
    model = build(family, attention or ("eager" if "gemma2" in name else "sdpa"))
    return model, next(one for one in cases_of(family, model) if one.name == case_name)


@pytest.fixture(autouse=True)
def _exact():
    with in_fp64():
        yield


@pytest.mark.parametrize("name", BY_HOOK.values(), ids=list(BY_HOOK))
def test_each_hook_is_exact(name: str):
    has_images = FAMILIES[name].make_images is not None
    model, case = made(name, "images" if has_images else "text")
    for plan_name, plan in case.plans():
        for gated in (range(0, 4), range(1, 3)):
            with attached(model, gated):
                found = attached_run(model, case.inputs, plan)
            wanted = oracle_run(model, case.inputs, plan, gated)
            assert loss_error(found, wanted) <= TOLERANCE, plan_name
            assert gradient_error(found, wanted)[0] <= TOLERANCE, plan_name


@pytest.mark.parametrize(
    ("name", "case", "fault"),
    [
        ("gpt_oss", "packed", "lets them see each other"),
        ("qwen3_next", "packed", "has layers that carry a state from one to the next"),
        ("gemma3", "packed images", "misplaces their images in its masks"),
    ],
)
def test_packed_rows_are_refused_where_the_host_mixes_them(name: str, case: str, fault: str):
    attention = "eager" if name == "gpt_oss" else "sdpa"
    model, packed = made(name, case, attention)
    message = f"a row holds several samples, but {type(model).__name__} {fault}; give each sample"
    with attached(model, range(4)), pytest.raises(ValueError, match=message):
        attached_run(model, packed.inputs, packed.plan("answers"))


@pytest.mark.parametrize(("name", "case"), [("paligemma", "packed images"), ("gemma3", "packed")])
def test_packed_rows_under_masks_of_the_host_are_exact(name: str, case: str):
    model, packed = made(name, case)
    for plan_name, plan in packed.plans():
        with attached(model, range(1, 4)):
            found = attached_run(model, packed.inputs, plan)
        wanted = oracle_run(model, packed.inputs, plan, range(1, 4))
        assert loss_error(found, wanted) <= TOLERANCE, plan_name
        assert gradient_error(found, wanted)[0] <= TOLERANCE, plan_name


def test_a_layer_argument_that_nobody_knows_is_refused_by_name():
    model, case = made("llama", "text")
    inputs = {**case.inputs, "importance": case.batch.labels_BT}
    message = "LlamaDecoderLayer is given 'importance', of which elision does not know whether"
    with attached(model, range(4)), pytest.raises(ValueError, match=message):
        attached_run(model, inputs, case.plan("answers"))


def test_layers_that_are_not_given_the_plan_are_refused():
    model, case = made("llama", "text")
    with attached(model, range(1, 3)):
        layer = model.model.layers[2]
        forward = layer.forward
        layer.forward = lambda *args, regate_plan, **kwargs: forward(*args, **kwargs)
        for plan in ("answers", "all kept"):
            with pytest.raises(ValueError, match="3 of 4 decoder layers of LlamaForCausalLM were"):
                attached_run(model, case.inputs, case.plan(plan))
        layer.forward = forward


def test_the_experts_loss_is_refused_in_the_configuration_and_in_a_call():
    model, case = made("qwen3_moe", "text")
    message = "output_router_logits=True asks for the load-balancing loss"
    with attached(model, range(4)), pytest.raises(ValueError, match=message):
        attached_run(model, {**case.inputs, "output_router_logits": True}, case.plan("answers"))
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match=message), attached(model, range(4)):
        pass


@pytest.mark.parametrize("name", ["qwen2_5_vl", "ernie4_5_vl_moe", "gemma3", "paligemma"])
def test_images_without_their_marks_are_refused_where_the_host_says_nothing(name: str):
    model, case = made(name, "images")
    inputs = {key: x for key, x in case.inputs.items() if "token_type_ids" not in key}
    message = f"images are given without '.*token_type_ids': {type(model).__name__} would"
    with attached(model, range(4)), pytest.raises(ValueError, match=message):
        attached_run(model, inputs, case.plan("answers"))


def test_a_class_that_is_not_listed_is_refused_in_one_line():
    model = build(FAMILIES["mamba"], "eager")
    with (
        pytest.raises(ValueError, match="docs/models.md lists what") as caught,
        attached(model, range(4)),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_packed_rows_of_several_axes_need_positions_that_keep_samples_apart():
    model, case = made("qwen2_vl", "packed")
    assert case.inputs["position_ids"].shape[0] == 4
    inputs = {**case.inputs, "position_ids": case.inputs["position_ids"][0]}
    with attached(model, range(4)), pytest.raises(ValueError, match="keeps samples apart by"):
        attached_run(model, inputs, case.plan("answers"))


@pytest.mark.parametrize("lack", ["position_ids", "mask"])
def test_packed_rows_are_refused_where_the_call_does_not_keep_samples_apart(lack: str):
    model, case = made("llama", "packed")
    inputs = dict(case.inputs)
    if lack == "mask":
        inputs["attention_mask"] = (case.batch.segment_BT >= 0).long()
    else:
        del inputs["position_ids"]
    message = "a row holds several samples, but the call has (no position_ids|an attention_mask)"
    with attached(model, range(4)), pytest.raises(ValueError, match=message):
        attached_run(model, inputs, case.plan("answers"))


@pytest.mark.parametrize(
    ("name", "fields"),
    [("llama", {"is_causal": False}), ("gemma", {"use_bidirectional_attention": True})],
)
def test_a_decoder_whose_tokens_see_later_ones_is_refused(name: str, fields: dict[str, Any]):
    model, _ = made(name, "text")
    for field, value in fields.items():
        setattr(model.config, field, value)
    with (
        pytest.raises(ValueError, match="makes every token see later ones"),
        attached(model, range(4)),
    ):
        pass


def test_layers_that_share_keys_are_gated_together_or_not_at_all():
    model, _ = made("gemma4_text, shared keys", "text")
    message = r"the last 2 layers read keys of layers from 0 on, which gated layers \[1, 4\)"
    with pytest.raises(ValueError, match=message), attached(model, range(1, 4)):
        pass
    with attached(model, range(1, 4), "mlp_only"):
        pass


@pytest.mark.parametrize("name", ["phi4_multimodal", "qwen3_vl"])
def test_the_empty_image_reaches_what_images_reach(name: str):
    """Also where the base model puts images into the embeddings itself, or between its layers."""
    model, _ = made(name, "text")
    assert empty_image(model, cases_of(FAMILIES[name], model)) == "yes"
