"""The loop around an engine: windows, what backward is given, state; with a stand-in engine.

Real engines on several ranks: tests/adapters/deepspeed/test_zero.py.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from regate_ds.adapters.huggingface.gates import ElidedOutput
from regate_ds.adapters.torch.attach import attach
from regate_ds.adapters.torch.loop import LoopRegate
from regate_ds.adapters.window import PLAN
from regate_ds.algorithm.batch import IGNORE, TokenBatch, host_labels
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.config import RegateConfig
from regate_ds.data.collate import Batch
from regate_ds.data.keyed import Keyed
from tests.adapters.huggingface.gated_cases_helper import text_case
from tests.support.measure import assert_gradients_equal, gradients
from tests.support.models import causal_lm, llava
from tests.support.planning import config_of, plan_sparse
from tests.support.stores import RandomReference, index_of

NUM_MICRO = 3


def engine(num_micro: int = NUM_MICRO, **attributes) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "device": torch.device("cpu"),
            "dp_world_size": 1,
            "micro_steps": 0,
            "global_steps": 0,
            "sequence_parallel_size": 1,
            "zero_optimization_stage": lambda: 0,
            "gradient_accumulation_steps": lambda: num_micro,
            **attributes,
        }
    )


def batches(number: int = NUM_MICRO) -> list[Batch]:
    """Micro-batches of different sizes, so that a mean of means is wrong."""
    made = []
    for n in range(number):
        case = text_case([[24 - 5 * n], [7 + 2 * n]], seed=n)
        keys = tuple(((f"micro{n}", i),) for i in range(2))
        made.append(Batch({"input_ids": case.input_ids}, replace(case.batch, keys=keys)))
    return made


def config(**knobs) -> RegateConfig:
    return config_of(**{"warmup": 0, "final_dense_share": 0.0, **knobs})


def made(loader: list[Batch] | None = None, own_loss: bool = False, total_steps: int = 4, **knobs):
    loader = loader or batches()
    model = causal_lm()
    reference = RandomReference(index_of(batch.tokens for batch in loader))
    options = {"reference": reference, "own_loss": own_loss, "total_steps": total_steps}
    return model, attach(model, config(**knobs), **options)


def first_window(regate: LoopRegate, loader: list[Batch], used: SimpleNamespace | None = None):
    return next(regate.windows(loader, used or engine()))


@pytest.mark.parametrize("knobs", [{}, {"warmup": 1}, {"keep_share": 1.0}])
def test_what_the_engine_divides_by_is_undone_and_targets_weigh_alike(knobs: dict):
    model, regate = made(**knobs)
    total, count = 0.0, 0
    for inputs in first_window(regate, batches()):
        output = model(**inputs)
        # The engine divides what it is given by the accumulation steps.
        (regate.loss(output) / NUM_MICRO).backward()
        total, count = total + output.loss_sum.item(), count + output.plan.num_targets
    found = gradients(model)
    other, again = made(**knobs)
    losses = [other(**inputs).loss_sum for inputs in first_window(again, batches())]
    (sum(losses) / count).backward()
    assert sum(losses).item() == pytest.approx(total)
    assert_gradients_equal(found, gradients(other), 1e-6)


def test_weighted_token_losses_are_the_loss_and_have_its_gradients():
    results = []
    for own_loss in (False, True):
        model, regate = made(own_loss=own_loss)
        total = 0.0
        for inputs in first_window(regate, batches()):
            output = model(**inputs)
            if own_loss:
                losses, weights = regate.token_losses(output)
                total = total + (losses * weights).sum()
            else:
                total = total + regate.loss(output)
        total.backward()
        regate.step(applied=True)
        results.append((total.item(), gradients(model)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
    assert_gradients_equal(results[1][1], results[0][1], 1e-6)


def test_token_losses_must_be_asked_for():
    model, regate = made()
    inputs = first_window(regate, batches())[0]
    with pytest.raises(RuntimeError, match=r"token_losses needs attach\(..., own_loss=True\)"):
        regate.token_losses(model(**inputs))


def test_an_auxiliary_loss_is_added_once_and_unscaled():
    _, regate = made()
    plan = first_window(regate, batches())[1][PLAN]
    losses = torch.rand(plan.num_targets)
    output = ElidedOutput(
        loss_sum=losses.sum(), losses=losses, aux_loss=torch.tensor(7.0), plan=plan
    )
    count = regate.plan.num_targets_global
    wanted = losses.sum() * NUM_MICRO / count + 7.0
    assert regate.loss(output).item() == pytest.approx(wanted.item())


def run(regate: LoopRegate, model, loader: list[Batch], used: SimpleNamespace) -> list[ElisionPlan]:
    """The plans of the micro-batches."""
    kept = []
    for window in regate.windows(loader, used):
        for inputs in window:
            regate.loss(model(**inputs))
            kept.append(inputs[PLAN])
        regate.step(applied=True)
    return kept


def test_a_window_is_one_step_and_what_does_not_fill_one_is_left_out_and_said(caplog):
    loader = batches(5)
    model, regate = made(loader)
    with caplog.at_level(logging.WARNING):
        kept = run(regate, model, loader, engine(num_micro=2))
    assert len(kept) == 4
    assert "left out the last 1 micro-batches of the epoch: a step takes 2" in caplog.text
    assert regate.metrics()["step"] == 1


def test_a_loader_shorter_than_a_step_is_refused():
    loader = batches(2)
    _, regate = made(loader)
    with pytest.raises(ValueError, match="ended after 2 of the 3 micro-batches of a step"):
        list(regate.windows(loader, engine()))


def test_a_loaded_run_goes_on_as_if_it_had_never_stopped(tmp_path):
    # The second step elides answers and image tokens.
    images = {"keep_share": 0.5, "schedule": {"warmup": 1, "cycle_steps": 2}}
    by_memory_alone = {"warmup": 1, "reference_weight": 0.0, "images": images}
    model, whole = made(**by_memory_alone)
    used = engine()
    run(whole, model, batches(), used)
    wanted = run(whole, model, batches(), used)
    other, begun = made(**by_memory_alone)
    run(begun, other, batches(), engine())
    begun.save(tmp_path)
    third, resumed = made(**by_memory_alone)
    resumed.load(tmp_path)
    found = run(resumed, third, batches(), engine())
    assert all(torch.equal(a.kept_BK, b.kept_BK) for a, b in zip(found, wanted, strict=True))
    assert resumed.metrics() == whole.metrics()
    assert whole.metrics()["image_kept"] < whole.metrics()["image_total"]
    for batch, with_memory in zip(batches(), wanted, strict=True):
        zeros_N = torch.zeros(int(batch.tokens.is_label_BT.sum()))
        without = plan_sparse(batch.tokens, zeros_N, keep_share=0.5, align="predictor")
        assert not torch.equal(without.label_position_L, with_memory.label_position_L)


def test_a_folder_without_our_state_is_refused(tmp_path):
    _, regate = made()
    with pytest.raises(ValueError, match="has no state.json; resume from a checkpoint of regate"):
        regate.load(tmp_path)


def test_nothing_works_before_the_first_window():
    _, regate = made()
    with pytest.raises(RuntimeError, match=r"iterate over regate.windows\(loader, engine\)"):
        regate.loss(ElidedOutput(plan=text_case([[9]]).plan))
    with pytest.raises(RuntimeError, match="no step is planned yet"):
        regate.metrics()


def test_a_second_engine_is_refused():
    _, regate = made()
    first_window(regate, batches())
    with pytest.raises(RuntimeError, match="serves another engine already; attach once per run"):
        first_window(regate, batches(), engine())


def test_sequence_parallel_engines_are_refused():
    _, regate = made()
    with pytest.raises(ValueError, match="sequence parallel size 2 is not supported"):
        first_window(regate, batches(), engine(sequence_parallel_size=2))


def test_a_step_without_any_answer_is_refused():
    batch = batches(1)[0]
    tokens = batch.tokens
    silent = TokenBatch(tokens.keys, tokens.segment_BT, torch.full_like(tokens.labels_BT, IGNORE))
    loader = [Batch(batch.inputs, silent)]
    _, regate = made(loader)
    with pytest.raises(ValueError, match=r"step 0 has no answer token on any rank; .*, such as \("):
        first_window(regate, loader, engine(num_micro=1))


def test_disabled_touches_neither_model_nor_batch_nor_disk(tmp_path):
    loader = batches()
    model, regate = made(loader, enabled=False)
    assert all("forward" not in vars(module) for module in model.modules())
    (window,) = regate.windows(loader, engine())
    for inputs, batch in zip(window, loader, strict=True):
        assert inputs.keys() == {"input_ids", "labels"}
        assert torch.equal(inputs["labels"], host_labels(batch.tokens.labels_BT))
    loss = torch.rand(())
    assert regate.loss(SimpleNamespace(loss=loss)) is loss
    regate.step(applied=True)
    regate.save(tmp_path)
    regate.load(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_follows_a_removal_is_the_hosts_own_run(tmp_path):
    loader, used = batches(), engine()
    model, regate = made(loader)
    run(regate, model, loader, used)
    regate.remove()
    assert all("forward" not in vars(module) for module in model.modules())
    for inputs in first_window(regate, loader, used):
        assert PLAN not in inputs
        output = model(**inputs)
        assert regate.loss(output) is output.loss
    regate.step(applied=True)
    regate.save(tmp_path)
    assert regate.metrics() == {}
    assert list(tmp_path.iterdir()) == []


def test_a_load_forgets_a_step_that_is_not_ended(tmp_path):
    loader, used = batches(), engine()
    model, regate = made(loader)
    run(regate, model, loader, used)
    regate.save(tmp_path)
    first_window(regate, loader, used)
    regate.load(tmp_path)
    run(regate, model, loader, used)
    assert regate.metrics()["step"] == 1


def test_a_slice_of_a_window_is_a_window():
    _, regate = made()
    window = first_window(regate, batches())
    assert [inputs[PLAN].micro for inputs in window[1:]] == [1, 2]


def test_an_input_with_the_plans_name_is_refused():
    loader = [Batch({**batch.inputs, PLAN: torch.ones(1)}, batch.tokens) for batch in batches()]
    _, regate = made(loader)
    with pytest.raises(ValueError, match="an input 'regate_plan', the plan's own name; rename it"):
        first_window(regate, loader)[0]


def test_a_wrapped_collate_hides_labels_from_an_elided_run_and_leaves_them_to_the_host():
    ids = torch.tensor([[4, 5, 6]])
    dataset = Keyed([{"input_ids": ids, "labels": ids}], "mine")
    batch = made()[1].collate(lambda items: dict(items[0]))([dataset[0]])
    assert batch.inputs.keys() == {"input_ids"}
    assert batch.tokens.labels_BT.tolist() == [[5, 6, IGNORE]]
    host_batch = made(enabled=False)[1].collate(lambda items: dict(items[0]))([dataset[0]])
    assert host_batch.keys() == {"input_ids", "labels"}


def test_disabled_hands_on_whatever_the_loader_gives_and_leaves_nothing_out(caplog):
    loader = [{"input_ids": torch.ones(1, 2), "names": ["a"]}, None, "b", [3], (4, 5)]
    _, regate = made(enabled=False)
    windows = list(regate.windows(loader, engine(num_micro=2)))
    assert [len(window) for window in windows] == [2, 2, 1]
    found = [inputs for window in windows for inputs in window]
    assert torch.equal(found[0]["input_ids"], torch.ones(1, 2))
    assert found[0]["names"] == ["a"]
    assert found[1:] == loader[1:]
    assert caplog.text == ""


def test_a_micro_batch_is_moved_when_it_is_taken_not_before():
    _, regate = made()
    window = first_window(regate, batches(), engine(device=torch.device("meta")))
    assert len(window) == NUM_MICRO
    inputs = window[1]
    assert inputs["input_ids"].is_meta
    assert inputs[PLAN].kept_BK.is_meta
    assert not regate.plan.micro[1].kept_BK.is_meta


def test_several_ranks_without_a_launcher_are_refused_where_there_is_a_tower():
    loader = batches()
    reference = RandomReference(index_of(batch.tokens for batch in loader))
    regate = attach(llava(), config(), total_steps=4, reference=reference)
    with pytest.raises(RuntimeError, match=r"2 data ranks.*deepspeed.init_distributed\(\) before"):
        first_window(regate, loader, engine(dp_world_size=2))


def load(regate: LoopRegate, folder: Path) -> None:
    """Load, which is done when the engine is known."""
    regate.load(folder)
    first_window(regate, batches())


def saved(folder: Path, **knobs) -> LoopRegate:
    model, regate = made(**knobs)
    run(regate, model, batches(), engine())
    regate.save(folder)
    return regate


def test_a_save_cut_short_over_an_older_one_is_noticed(tmp_path):
    saved(tmp_path)
    old_state = (tmp_path / "regate" / "state.json").read_bytes()
    model, regate = made()
    used = engine()
    regate.load(tmp_path)
    run(regate, model, batches(), used)
    regate.save(tmp_path)
    (tmp_path / "regate" / "state.json").write_bytes(old_state)
    with pytest.raises(ValueError, match=r"was written 2 times, its state.json says 1"):
        load(made()[1], tmp_path)


def test_of_saves_by_several_numbers_of_ranks_the_last_is_read(tmp_path):
    saved(tmp_path)
    (tmp_path / "regate" / "difficulty-0-of-2.npz").write_bytes(b"of an older save")
    load(made()[1], tmp_path)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"warmup": 1}, "warmup_steps is 1 by this configuration, but 0 in the checkpoint's run"),
        ({"final_dense_share": 0.5}, "final_dense_steps is 2 by this"),
        ({"cycle_steps": 2}, "cycle_steps is 2 by this"),
        ({"images.schedule": {"warmup": 3}}, "images.schedule is .* but None in the checkpoint's"),
        ({"total_steps": 5}, "total_steps=5, but the checkpoint's run has 4"),
    ],
)
def test_another_schedule_is_refused(tmp_path, knobs: dict, message: str):
    saved(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(made(**knobs)[1], tmp_path)


def test_a_dense_runs_state_does_not_serve_an_elided_one(tmp_path):
    saved(tmp_path, keep_share=1.0)
    with pytest.raises(ValueError, match="is of a run without difficulty, as a dense one"):
        load(made()[1], tmp_path)


def test_a_call_without_the_plan_is_named():
    model, regate = made()
    inputs = first_window(regate, batches())[0]
    del inputs[PLAN]
    with pytest.raises(ValueError, match="returned CausalLMOutputWithPast, without a plan"):
        regate.loss(model(**inputs))


def test_a_loader_without_our_collate_is_named():
    _, regate = made()
    with pytest.raises(ValueError, match=r"yields dict; give it collate_fn=regate.collate"):
        first_window(regate, [batch.inputs for batch in batches()])  # type: ignore[misc]


def test_a_reference_that_is_no_store_is_named():
    with pytest.raises(ValueError, match="reference='store' is a str; give a ReferenceStore"):
        attach(causal_lm(), config(), reference="store")  # type: ignore[arg-type]


def test_a_run_without_a_sparse_step_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        made(warmup=4)
    assert "all of the 4 steps are dense" in caplog.text


def test_an_engine_is_not_attached_to():
    with pytest.raises(ValueError, match="attach to the model before deepspeed.initialize"):
        attach(engine(), config(score="random"))  # type: ignore[arg-type]


def test_without_elision_there_are_no_counts():
    regate = attach(causal_lm(), config(enabled=False), total_steps=4)
    assert regate.metrics() == {}
