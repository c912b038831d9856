"""The loop of plain torch in one process: its gradients, and what is refused of every loop."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from regate_ds import Loop, attach
from regate_ds.adapters.huggingface.gates import ElidedOutput, attach_model
from regate_ds.adapters.torch.accelerator import AcceleratorHost
from regate_ds.adapters.torch.checks import LoopOptions, require_loop_ranks
from regate_ds.adapters.window import PLAN
from tests.adapters.deepspeed.test_loop import batches, engine, made
from tests.adapters.huggingface.test_oracle_images import PATCH_GRIDS, qwen2_vl_case
from tests.adapters.torch.loops_helper import whole
from tests.adapters.torch.pages_helper import DOCS, LOOP_PAGES, check_page, new_lines, other_block
from tests.adapters.torch.runs_helper import (
    ACCUMULATION,
    EPOCHS,
    LR,
    attached,
    collate,
    loader_with,
)
from tests.support.measure import assert_gradients_equal, gradients, relative_error
from tests.support.models import causal_lm, qwen2_vl
from tests.support.planning import config_of

TWO = Loop(accumulation=2)


def loop_gradients(
    accumulation: int, *, dtype: torch.dtype | None = None, prepare=None, **knobs
) -> dict[str, Tensor]:
    """The gradients of one step, as the optimizer would get them."""
    model, regate = made(batches(accumulation), **knobs)
    if prepare is not None:
        prepare(model)
    (window,) = regate.windows(batches(accumulation), Loop(accumulation=accumulation))
    for batch in window:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            output = model(**batch)
        regate.loss(output).backward()
    regate.step(applied=True)
    return gradients(model)


def joint_gradients(number: int, **knobs) -> dict[str, Tensor]:
    """The sum of all losses over the count of all targets, in one backward pass."""
    model, regate = made(batches(number), **knobs)
    outputs = [model(**b) for b in next(regate.windows(batches(number), engine(number)))]
    count = sum(output.plan.num_targets for output in outputs)
    (torch.stack([output.loss_sum for output in outputs]).sum() / count).backward()
    return gradients(model)


@pytest.mark.parametrize("knobs", [{}, {"warmup": 1}, {"images.keep_share": 0.5}])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_gradient_of_a_step_is_that_of_the_mean_over_its_targets(accumulation: int, knobs):
    found = loop_gradients(accumulation, **knobs)
    assert_gradients_equal(found, joint_gradients(accumulation, **knobs), 1e-5)


@pytest.mark.parametrize("knobs", [{}, {"warmup": 1}])
def test_autocast_rounds_and_changes_nothing_else(knobs: dict):
    found = loop_gradients(4, dtype=torch.bfloat16, **knobs)
    assert {g.dtype for g in found.values()} == {torch.float32}
    # bfloat16 has three digits; a wrong scale would be off by a factor.
    assert relative_error(found, joint_gradients(4, **knobs)) < 0.03


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    return model


def sharded_and_compiled(model: nn.Module) -> None:
    sharded(model).gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    # The one that gathers; each further one takes as long again.
    model.model.layers[1].compile(dynamic=True, backend="eager")


def test_a_layer_of_fsdp2_may_be_compiled_and_computed_again(one_rank):
    torch._dynamo.reset()
    found = loop_gradients(1, prepare=sharded_and_compiled)
    found = {name: whole(gradient) for name, gradient in found.items()}
    assert_gradients_equal(found, joint_gradients(1), 1e-5)


def host_losses(model: nn.Module) -> Iterator[Tensor]:
    """A loop that has never heard of us."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    loader: DataLoader = loader_with(collate, sampled=False)
    for _ in range(EPOCHS):
        for number, batch in enumerate(loader, start=1):
            loss = model(**batch).loss / ACCUMULATION
            loss.backward()
            yield loss.detach()
            if number % ACCUMULATION == 0 or number == len(loader):
                optimizer.step()
                optimizer.zero_grad()


def disabled_losses(model: nn.Module) -> Iterator[Tensor]:
    regate = attached(model, enabled=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    loader = loader_with(regate.collate(collate), sampled=False)
    for _ in range(EPOCHS):
        for window in regate.windows(loader, Loop(accumulation=ACCUMULATION)):
            for batch in window:
                loss = regate.loss(model(**batch))
                loss.backward()
                yield loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            regate.step(applied=True)
    assert regate.state_dict() == {}


def test_disabled_losses_and_weights_are_a_plain_loops_bit_for_bit():
    ours, host = causal_lm(), causal_lm()
    assert torch.equal(torch.stack([*disabled_losses(ours)]), torch.stack([*host_losses(host)]))
    for mine, theirs in zip(ours.parameters(), host.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_page_runs_as_it_stands_and_off_is_the_loop_before():
    check_page("torch_loop.md")


@pytest.mark.parametrize("page", LOOP_PAGES)
def test_a_page_is_short_and_changes_six_lines_of_a_loop(page: str):
    assert len((DOCS / page).read_text().splitlines()) <= 60
    assert len(new_lines(page)) <= 6, new_lines(page)


def test_the_loop_of_ddp_has_as_few_lines_of_ours():
    lines = other_block("torch_loop.md", "DistributedDataParallel").splitlines()
    assert len([line for line in lines if "regate" in line or "window" in line]) <= 6


def test_an_auxiliary_loss_is_averaged_over_the_micro_batches():
    _, regate = made(batches(2))
    plan = next(regate.windows(batches(2), TWO))[0][PLAN]
    losses = torch.rand(plan.num_targets)
    output = ElidedOutput(losses.sum(), losses, aux_loss=torch.tensor(7.0), plan=plan)
    wanted = losses.sum() / regate.plan.num_targets_global + 7.0 / 2
    assert regate.loss(output).item() == pytest.approx(wanted.item())


@pytest.mark.parametrize("accumulation", [0, -1, 2.0, True, "4"])
def test_an_accumulation_that_is_no_number_of_micro_batches_is_refused(accumulation):
    with pytest.raises(ValueError, match=r"must be a whole number, at least 1: the micro-batches"):
        Loop(accumulation=accumulation)


@pytest.mark.parametrize("host", [None, 4, nn.Linear(1, 1), SimpleNamespace(device="cpu")])
def test_what_is_no_host_is_refused(host):
    _, regate = made()
    with pytest.raises(ValueError, match=r"hand over a DeepSpeed engine, an Accelerator, or"):
        next(regate.windows(batches(), host))


def test_the_same_loop_may_be_given_again_and_another_one_is_refused():
    model, regate = made(batches(2))
    for window in regate.windows(batches(2), TWO):
        for batch in window:
            regate.loss(model(**batch))
        regate.step(applied=True)
    next(regate.windows(batches(2), Loop(accumulation=2)))
    message = r"Loop\(accumulation=3.* was given after Loop\(accumulation=2.*serves another Loop"
    with pytest.raises(RuntimeError, match=message):
        next(regate.windows(batches(), Loop(accumulation=3)))
    with pytest.raises(RuntimeError, match="SimpleNamespace was given after Loop"):
        next(regate.windows(batches(), engine()))


def test_a_loop_that_ends_its_step_too_early_is_told():
    model, regate = made(batches(2))
    window = next(regate.windows(batches(2), TWO))
    regate.loss(model(**window[0]))
    with pytest.raises(RuntimeError, match="micro-batch"):
        regate.step(applied=True)


def test_a_loader_without_our_collate_is_named():
    _, regate = made()
    with pytest.raises(ValueError, match=r"yields dict; give it collate_fn=regate.collate"):
        next(regate.windows(loader_with(collate, sampled=False), TWO))


def test_an_output_and_a_batch_tell_where_to_find_what_they_do_not_have():
    model, regate = made(batches(2))
    output = model(**next(regate.windows(batches(2), TWO))[0])
    with pytest.raises(AttributeError, match=r"no output.loss: take regate.loss\(output\)"):
        _ = output.loss
    with pytest.raises(AttributeError, match=r"no output.logits: they are computed at kept"):
        _ = output.logits
    batch: Any = batches(2)[0]
    for use in (lambda: model(**batch), batch.items, lambda: batch["input_ids"]):
        with pytest.raises(TypeError, match=r"no plan yet: take it from regate.windows"):
            use()


def test_several_ranks_without_their_group_are_refused(monkeypatch):
    _, regate = made()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="this job has 2 ranks: give Loop the group"):
        next(regate.windows(batches(), TWO))


def test_a_state_that_is_not_ours_is_refused():
    _, regate = made()
    with pytest.raises(ValueError, match=r"no state of ReGATE \(\['model'\]\); resume from one"):
        regate.load_state_dict({"model": 1})
    # Nothing is there to save before the first window, and nothing can be loaded from that.
    with pytest.raises(ValueError, match="saved after the first window"):
        regate.load_state_dict(regate.state_dict())


def fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (DistributedDataParallel, "by DistributedDataParallel; call attach before Distributed"),
        (sharded, "by FSDPModule; call attach before fully_shard"),
        (fsdp1, "by FullyShardedDataParallel; FSDP1 hides its parameters: use FSDP2"),
    ],
)
def test_a_model_that_is_wrapped_already_is_refused(one_rank, wrap, message: str):
    model = wrap(causal_lm())
    with pytest.raises(ValueError, match=message):
        attach(model, config_of(score="random"), total_steps=4)
    with pytest.raises(ValueError, match=message):
        attach_model(model, config_of(score="random"))


def test_parts_with_several_divide_factors_are_refused(one_rank):
    model, regate = made()
    sharded(model).model.layers[1].set_gradient_divide_factor(4.0)
    output = model(**next(regate.windows(batches(), Loop(accumulation=3)))[0])
    with pytest.raises(ValueError, match=r"divide factors are \[4.0, None\] in parts of one model"):
        regate.loss(output)


def test_images_and_videos_in_a_micro_batch_of_fsdp2_are_refused_without_what_ranks_agreed_on(
    one_rank,
):
    model = qwen2_vl()
    attach_model(model, config_of(score="random"), run_tower_without_image=True)
    fully_shard(model)
    case = qwen2_vl_case([20, 15], PATCH_GRIDS)
    videos = {"pixel_values_videos": case.inputs["pixel_values"]}
    with pytest.raises(ValueError, match="images and videos: under ZeRO-3 or FSDP2.*regate_tower"):
        model(**case.inputs, **videos, regate_plan=case.plan)


def test_fsdp1_around_an_attached_model_is_refused(one_rank):
    model, regate = made()
    fsdp1(model)
    with pytest.raises(ValueError, match="by FullyShardedDataParallel; FSDP1 hides"):
        next(regate.windows(batches(), TWO))


def test_modules_that_run_once_an_image_are_refused_where_ranks_enter_them_together():
    options = LoopOptions(model=causal_lm(), runs_by_image=True)
    require_loop_ranks(SimpleNamespace(num_ranks=2, stage=1), options)
    with pytest.raises(ValueError, match="once for each image: under ZeRO-3 or FSDP2"):
        require_loop_ranks(SimpleNamespace(num_ranks=2, stage=3), options)


class FakeAccelerator(SimpleNamespace):
    """What is asked of an Accelerator, of several ranks and settings that a test cannot have."""

    __module__ = "accelerate.accelerator"

    def __init__(self, kind: str = "NO", **changes: Any) -> None:
        plain = {
            "distributed_type": SimpleNamespace(value=kind),
            "gradient_state": SimpleNamespace(in_dataloader=False, sync_with_dataloader=True),
            "gradient_accumulation_steps": 3,
            "parallelism_config": None,
            "dispatch_batches": None,
            "num_processes": 1,
            "is_fsdp2": False,
            "device": torch.device("cpu"),
        }
        super().__init__(**{**plain, **changes})


def test_windows_that_accelerate_would_carry_over_the_loaders_end_are_refused():
    state = SimpleNamespace(in_dataloader=False, sync_with_dataloader=False)
    host = AcceleratorHost(FakeAccelerator(gradient_state=state), causal_lm())
    with pytest.raises(ValueError, match="^sync_with_dataloader=False carries micro-batches"):
        host.begin(3)


TENSOR_PARALLEL = SimpleNamespace(non_data_parallel_size=2)


def other_engine() -> SimpleNamespace:
    return SimpleNamespace(engine=engine(num_micro=4))


@pytest.mark.parametrize(
    ("accelerator", "message"),
    [
        (FakeAccelerator("XLA"), "distributed_type=XLA; use one process, DDP, FSDP2"),
        (FakeAccelerator("MEGATRON_LM"), "distributed_type=MEGATRON_LM"),
        (FakeAccelerator("FSDP"), "fsdp_version=1, which hides"),
        (FakeAccelerator(parallelism_config=TENSOR_PARALLEL), "cuts samples over ranks"),
        (FakeAccelerator(dispatch_batches=True), "dispatch_batches=True"),
        (FakeAccelerator(num_processes=2), "2 of this job's 1 ranks"),
        (FakeAccelerator("DEEPSPEED"), "DeepSpeed before accelerator.prepare"),
        (
            FakeAccelerator("DEEPSPEED", deepspeed_engine_wrapped=other_engine()),
            "an engine of another accumulation than its own 3",
        ),
    ],
)
def test_what_accelerate_may_be_set_to_and_is_not_supported(accelerator, message: str):
    _, regate = made()
    with pytest.raises(ValueError, match=f"accelerate is not supported with .*{message}"):
        next(regate.windows(batches(), accelerator))
    assert len(next(regate.windows(batches(), FakeAccelerator()))) == 3
