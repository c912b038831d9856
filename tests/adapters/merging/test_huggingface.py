"""Merged steps of Hugging Face models against the oracle on merged embeddings, in fp64."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from torch import nn

from regate_ds import Loop
from regate_ds.adapters.huggingface.gates import attach_model
from regate_ds.adapters.huggingface.wishes import Wishes
from regate_ds.algorithm.executions.merge import plan_patches
from regate_ds.config import RegateConfig
from regate_ds.merge_config import MergeConfig
from tests.adapters.deepspeed.test_loop import batches, made
from tests.adapters.huggingface.gated_cases_helper import (
    Case,
    assert_same_bits,
    embed_llava,
    embed_text,
    llava_case,
    text_case,
)
from tests.adapters.merging.merged_helper import merged_loss
from tests.families.zoo.fp64 import in_fp64
from tests.support.measure import assert_gradients_equal, gradients
from tests.support.models import causal_lm, llava, qwen2_vl
from tests.support.planning import config_of

EXACT = 1e-9
MERGED = MergeConfig(size=3, steps=0.5)


def merged(case: Case, size: int = 3) -> Case:
    return replace(case, plan=plan_patches(case.batch, size=size))


def text(rows: list[list[int]], size: int = 3, seed: int = 1) -> Case:
    """Text alone: without made-up images."""
    case = text_case(rows, seed=seed)
    return merged(replace(case, batch=replace(case.batch, image_BT=None)), size)


def attached(model: nn.Module, config: RegateConfig | None = None, **options: Any) -> nn.Module:
    model = copy.deepcopy(model)
    attach_model(model, config or RegateConfig(merge=MERGED), **options)
    return model


@in_fp64()
def assert_merged_exactly(model: nn.Module, case: Case, *, size: int = 3, **options: Any) -> None:
    model = model.double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in case.inputs.items()}
    case, embed = replace(case, inputs=inputs), options.pop("embed", embed_text)
    plain = copy.deepcopy(model)
    wanted = merged_loss(plain, embed(plain, case), case.batch, size)
    wanted.backward()
    fast = attached(model, **options)
    output = case.run(fast)
    assert output.losses.shape == (case.plan.num_targets,)
    torch.testing.assert_close(output.loss_sum, wanted, rtol=EXACT, atol=0.0)
    torch.testing.assert_close(output.losses.sum(), wanted, rtol=EXACT, atol=0.0)
    output.loss_sum.backward()
    assert_gradients_equal(gradients(fast), gradients(plain), EXACT)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [[[20], [9]], [[9, 11], [13, 4, 3]]])
def test_every_decoder_and_attention_is_exact(kind: str, attention: str, rows: list[list[int]]):
    assert_merged_exactly(causal_lm(kind, attention), text(rows))


@pytest.mark.parametrize("size", [2, 5, 30])
def test_every_size_of_a_patch_is_exact(size: int):
    assert_merged_exactly(causal_lm(), text([[23], [14]], size), size=size)


@pytest.mark.parametrize("rows", [[[40], [31]], [[17, 23]]])
def test_a_window_counts_patches(rows: list[list[int]]):
    model = causal_lm("mistral", sliding_window=3)
    assert_merged_exactly(model, text(rows))


@pytest.mark.parametrize("num_images", [[1, 2], [0, 1]])
def test_images_are_not_merged(num_images: list[int]):
    case = merged(llava_case([[25], [19]], num_images))
    assert_merged_exactly(llava(), case, embed=embed_llava)


def test_a_tied_head_and_losses_of_the_users_own_are_exact():
    model = causal_lm(tie_word_embeddings=True)
    assert_merged_exactly(model, text([[20], [9]]))
    assert_merged_exactly(model, text([[20], [9]]), own_loss=True)


def test_activation_checkpointing_changes_no_bit():
    model, found = causal_lm(), []
    for recompute in (False, True):
        fast = attached(model)
        if recompute:
            fast.gradient_checkpointing_enable({"use_reentrant": False})
        text([[20], [9]]).run(fast).loss_sum.backward()
        found.append(gradients(fast))
    assert_same_bits(*found)


def test_a_trainer_is_told_entropies_and_hits_of_each_target():
    model, case = causal_lm().double(), text([[30], [9]])
    output = case.run(attached(model, wishes=Wishes(observes=True)))
    plan, patches = case.plan, case.plan.patches
    assert patches is not None
    means_BKH = torch.stack(
        [
            embed_text(model, case).flatten(0, 1)[members[is_member]].mean(dim=0)
            if bool(is_member.any())
            else torch.zeros(32, dtype=torch.float64)
            for members, is_member in zip(patches.member_SM, patches.is_member_SM, strict=True)
        ]
    ).view(2, plan.num_slots, -1)
    logits_LV = model(inputs_embeds=means_BKH).logits.flatten(0, 1)[plan.label_slot_L]
    log_LV = logits_LV.log_softmax(dim=1)
    torch.testing.assert_close(output.entropy, -(log_LV.exp() * log_LV).sum(dim=1))
    assert torch.equal(output.is_top1, logits_LV.argmax(dim=1) == plan.targets_L)


@pytest.mark.parametrize("execution", ["elide", "mlp_only", "backward_only", "none"])
def test_other_steps_of_the_run_are_those_of_a_run_without_merging(execution: str):
    knobs = {"execution": execution, "score": "random"}
    model, case = causal_lm(), text_case([[20], [9]])
    found = []
    for merge in ({}, {"merge.steps": 0.5}):
        for each in (case, case.dense):
            fast = attached(model, config_of(**knobs, **merge))
            each.run(fast).loss_sum.backward()
            found.append(gradients(fast))
    assert_same_bits(found[0], found[2])
    assert_same_bits(found[1], found[3])


def test_a_call_without_a_plan_is_the_hosts_own_and_remove_leaves_nothing():
    model, case = causal_lm(), text([[12]])
    wanted = model(input_ids=case.input_ids).logits
    attachment = attach_model(model, RegateConfig(merge=MERGED))
    assert torch.equal(model(input_ids=case.input_ids).logits, wanted)
    attachment.remove()
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_plan_of_other_rows_is_refused():
    model, case = attached(causal_lm()), text([[20], [9]])
    longer = torch.nn.functional.pad(case.input_ids, (0, 3))
    for ids in (case.input_ids[:1], case.input_ids[:, :9], longer):
        with pytest.raises(ValueError, match=r"the decoder reads \d rows of \d+ tokens, the plan"):
            model(input_ids=ids, regate_plan=case.plan)


def test_what_cannot_be_merged_is_refused_by_name_before_anything_is_changed():
    unnamed = llava()
    unnamed.config.image_token_id = None
    for model, fault in (
        (qwen2_vl(), "gives its tokens several position numbers"),
        (unnamed, "does not tell the token that stands for images"),
    ):
        message = f"merged steps: {type(model).__name__} {fault}.*set merge.steps=0"
        with pytest.raises(ValueError, match=message):
            attach_model(model, RegateConfig(merge=MERGED))
        assert not any("forward" in vars(module) for module in model.modules())


def test_a_run_without_merged_steps_loads_nothing_of_them():
    code = (
        "import sys; from regate_ds.adapters.huggingface.gates import attach_model; "
        "from regate_ds.config import RegateConfig; from regate_ds.algorithm.scores.random import "
        "Random; from regate_ds.session import Regate; from regate_ds.stores.values import Stores; "
        "from tests.support.models import causal_lm, random_batch; config = "
        "RegateConfig(score=Random()); attach_model(causal_lm(), config); "
        "Regate(config, Stores(), total_steps=4).plan_step([random_batch([[9]])[1]]); "
        "print([m for m in sys.modules if 'merging' in m or m.endswith(('merge', 'patch_loss', "
        "'merge_switch'))])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_loop_goes_from_patches_to_tokens_with_the_same_weights():
    loader = batches(3)
    knobs = {"merge.steps": 2, "merge.size": 3, "warmup": 1, "final_dense_share": 0.25}
    model, regate = made(loader, total_steps=6, **knobs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows, figures = [], []
    for window in chain(regate.windows(loader, Loop()), regate.windows(loader, Loop())):
        for batch in window:
            regate.loss(model(**batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        regate.step(applied=True)
        rows.append(regate.metrics())
        figures.append(regate.figures())
    kinds = [(row["merged"], row["dense"]) for row in rows]
    assert kinds == [(True, False)] * 2 + [(False, True)] + [(False, False)] * 2 + [(False, True)]
    assert [row["tokens_kept"] < row["tokens_total"] for row in rows] == [
        not is_dense for _, is_dense in kinds
    ]
    at_switch = figures.pop(2)
    assert at_switch["loss_single"] > 0.0
    assert at_switch["loss_merged"] > 0.0
    assert not any("loss_single" in row for row in figures)
