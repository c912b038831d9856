"""The gated decoder against the per-layer oracle in fp64."""

from __future__ import annotations

import copy

import pytest
import torch

from regate_ds.adapters.huggingface import attach_model
from regate_ds.algorithm.batch import IGNORE
from regate_ds.algorithm.select import plan_dense, plan_sparse
from tests.models import IMAGE_TOKEN, causal_lm, llava, packed_positions, random_batch
from tests.oracle import assert_gradients_equal, decoder_losses, gradients

CASES = [
    ("llama", "sdpa", [[20], [13]], 0, None),
    ("llama", "sdpa", [[20], [13]], 1, None),
    ("llama", "sdpa", [[20], [13]], 2, 3),
    ("llama", "eager", [[7], [30]], 0, 2),
    ("qwen2", "eager", [[9, 11], [13]], 1, None),
    ("qwen2", "sdpa", [[9, 11], [13]], 0, 1),
    ("mistral", "sdpa", [[9, 11], [13, 4, 5]], 1, 2),
]


def planned(rows, *, seed: int = 1, **knobs):
    ids, batch = random_batch(rows, seed=seed)
    torch.manual_seed(seed)
    score_N = torch.rand(int(batch.is_label_BT.sum()))
    return (
        ids,
        batch,
        plan_sparse(batch, score_N, **{"keep_share": 0.5, "align": "predictor", **knobs}),
    )


def oracle_loss(host, embedded_BTH, batch, plan, gated: range):
    """Sum over samples, each computed on its own."""
    real = set(plan.position_R.tolist())
    num_tokens = batch.labels_BT.shape[1]
    total = 0.0
    for r, row in enumerate(batch.segment_BT.tolist()):
        for s in range(max(row) + 1):
            positions = [t for t in range(num_tokens) if row[t] == s]
            kept = [i for i, t in enumerate(positions) if r * num_tokens + t in real]
            labels = {i: int(batch.labels_BT[r, positions[i]]) for i in kept}
            labels = {i: y for i, y in labels.items() if y != IGNORE}
            embedded = embedded_BTH[r, positions]
            total = total + decoder_losses(host, embedded, kept=kept, gated=gated, labels=labels)
    return total


@pytest.mark.parametrize(("kind", "attention", "rows", "first", "last"), CASES)
def test_loss_and_gradients_equal_the_oracles(kind, attention, rows, first, last):
    model = causal_lm(kind, attention)
    exact = copy.deepcopy(model).double()
    ids, batch, plan = planned(rows)
    attach_model(model, first_layer=first, last_layer=last)
    positions = {"position_ids": packed_positions(batch)} if plan.is_packed else {}
    found = model(input_ids=ids, regate_plan=plan, **positions).loss_sum
    found.backward()
    embedded = exact.get_input_embeddings()(ids)
    wanted = oracle_loss(exact, embedded, batch, plan, range(first, last or 3))
    wanted.backward()
    assert abs(found.item() - wanted.item()) <= 1e-6 * abs(wanted.item())
    assert_gradients_equal(gradients(model), gradients(exact), 5e-6)


@pytest.mark.parametrize("first", [0, 1])
def test_llava_with_images_equals_the_oracle(first: int):
    model = llava()
    exact = copy.deepcopy(model).double()
    ids, batch, _ = planned([[20], [13]], seed=2)
    is_prompt = ~batch.is_label_BT
    ids[:, 1:5] = IMAGE_TOKEN
    labels = torch.where(ids.roll(-1, 1) == IMAGE_TOKEN, IGNORE, batch.labels_BT)
    batch = type(batch)(batch.keys, batch.segment_BT, labels)
    assert bool(is_prompt[:, 0].all())
    score_N = torch.rand(int(batch.is_label_BT.sum()))
    plan = plan_sparse(batch, score_N, keep_share=0.5, align="predictor")
    pixels = torch.randn(2, 3, 16, 16)
    attach_model(model, first_layer=first)
    found = model(input_ids=ids, pixel_values=pixels, regate_plan=plan).loss_sum
    found.backward()
    features = exact.model.get_image_features(pixels.double(), return_dict=True).pooler_output
    embedded = exact.get_input_embeddings()(ids).masked_scatter(
        (ids == IMAGE_TOKEN)[..., None], torch.cat(tuple(features))
    )
    wanted = oracle_loss(exact, embedded, batch, plan, range(first, 3))
    wanted.backward()
    assert abs(found.item() - wanted.item()) <= 1e-6 * abs(wanted.item())
    assert_gradients_equal(gradients(model), gradients(exact), 1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("last", [None, 2])
def test_activation_checkpointing_changes_no_bit(use_reentrant: bool, last: int | None):
    results = []
    for checkpointing in (False, True):
        model = causal_lm()
        attach_model(model, first_layer=1, last_layer=last)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        total = 0.0
        for seed in (1, 2):  # Two micro-batches in flight before the backward pass.
            ids, _, plan = planned([[20], [13]], seed=seed)
            total = total + model(input_ids=ids, regate_plan=plan).loss_sum
        total.backward()
        results.append(gradients(model))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_dense_step_is_the_host_bit_for_bit_up_to_the_head():
    model = causal_lm()
    host = copy.deepcopy(model)
    ids, batch = random_batch([[20], [13]], seed=4)
    attach_model(model, first_layer=1)
    seen = {}
    model.model.norm.register_forward_hook(lambda m, i, o: seen.setdefault("ours", o))
    host.model.norm.register_forward_hook(lambda m, i, o: seen.setdefault("host", o))
    total = model(input_ids=ids, regate_plan=plan_dense(batch)).loss_sum
    logits = host(input_ids=ids).logits
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels_BT.flatten(), reduction="sum"
    )
    assert torch.equal(seen["ours"], seen["host"])
    assert abs(total.item() - wanted.item()) <= 1e-6 * wanted.item()
    total.backward()
    wanted.backward()
    assert_gradients_equal(gradients(model), gradients(host), 1e-6)


def test_removing_leaves_the_model_as_it_was_found():
    model = causal_lm()
    ids, _, _ = planned([[9]])
    before, names = model(input_ids=ids).logits, set(model.state_dict())
    attachment = attach_model(model)
    assert set(model.state_dict()) == names
    assert torch.equal(model(input_ids=ids).logits, before)
    attachment.remove()
    assert all("forward" not in vars(module) for module in model.modules())


def test_attaching_twice_is_refused():
    model = causal_lm()
    attach_model(model)
    with pytest.raises(RuntimeError, match="already replaced"):
        attach_model(model)


def test_generation_after_attaching_is_the_hosts_own():
    model = causal_lm().eval()
    ids = torch.tensor([[3, 5, 7]])
    before = model.generate(ids, max_new_tokens=5, do_sample=False)
    attach_model(model)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), before)


def test_a_copy_of_an_attached_model_runs_its_own_weights():
    model = causal_lm()
    ids, _, plan = planned([[20], [13]])
    attach_model(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert copied(input_ids=ids, regate_plan=plan).loss_sum.item() != pytest.approx(
        model(input_ids=ids, regate_plan=plan).loss_sum.item()
    )


def test_own_losses_weighted_alike_give_the_same_gradient():
    results = []
    for own_loss in (False, True):
        model = causal_lm()
        ids, _, plan = planned([[20], [13]])
        attach_model(model, own_loss=own_loss)
        output = model(input_ids=ids, regate_plan=plan)
        (output.losses.sum() if own_loss else output.loss_sum).backward()
        results.append(gradients(model))
    assert_gradients_equal(results[1], results[0], 1e-6)


def test_rows_that_reach_the_attention_window_are_refused():
    model = causal_lm("mistral")
    model.config.sliding_window = 16
    attach_model(model)
    ids, _, plan = planned([[20]])
    with pytest.raises(ValueError, match="attention window of 16"):
        model(input_ids=ids, regate_plan=plan)


def test_a_range_beyond_the_decoder_is_refused():
    with pytest.raises(ValueError, match="decoder of 3 layers"):
        attach_model(causal_lm(), first_layer=1, last_layer=4)


def test_labels_beside_a_plan_are_refused():
    model = causal_lm()
    attach_model(model)
    ids, _, plan = planned([[9]])
    with pytest.raises(ValueError, match="no labels"):
        model(input_ids=ids, labels=ids, regate_plan=plan)


def test_a_micro_batch_without_an_image_reaches_every_weight_of_the_tower():
    model = llava()
    attach_model(model, run_tower_without_image=True)
    plain = llava()
    attach_model(plain)
    ids, _, plan = planned([[20], [13]])
    found = model(input_ids=ids, regate_plan=plan).loss_sum
    assert found.item() == plain(input_ids=ids, regate_plan=plan).loss_sum.item()
    found.backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    assert any("vision_tower" in name for name in reached)
    assert any("multi_modal_projector" in name for name in reached)
