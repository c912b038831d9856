"""The arms of `regate bench step` on a Hugging Face model, alone or in a DeepSpeed engine.

One model serves all arms: what an arm attaches is taken off again behind its turn. The optimizer's
update costs every arm the same, and is not timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from regate_ds.adapters.huggingface.gates import attach_model
from regate_ds.algorithm.plan import ElisionPlan, StepPlan
from regate_ds.cost.shape import shape_of
from regate_ds.parallel.layout import ParallelLayout
from regate_ds.recipe.bench.arms import Forward, StepArm
from regate_ds.recipe.bench.baselines import Losses
from regate_ds.recipe.bench.case import StepCase, as_loaded, make_data
from regate_ds.recipe.bench.host import ENDLESS, OnDevice, StepParts
from regate_ds.session import Regate
from regate_ds.stores.difficulty.indexed import DifficultyStore
from regate_ds.stores.values import Stores


class HuggingFaceHost:
    """A model, its data, and a session for each arm."""

    def __init__(self, case: StepCase, arms: dict[str, StepArm], device: torch.device) -> None:
        torch.manual_seed(case.seed)
        self._case, self._arms, self._device = case, arms, device
        self._model = make_model(case, device)
        self._stepper = _Stepper(self._model)
        self._engine: Any = None if case.zero_stage is None else _engine(case, self._stepper)
        self._data = make_data(case, dist.get_rank() if case.data_ranks > 1 else 0)
        self._ids = [b.inputs["input_ids"].to(device) for b in self._data.batches]
        self._sessions = {name: self._session(arm) for name, arm in arms.items()}
        self.shape = shape_of(self._model)
        self.layers = list(self._model.get_decoder().layers)
        self.weights = list(self._model.parameters())

    def _session(self, arm: StepArm) -> Regate:
        config, index = arm.config(self._case), self._data.index
        layout = ParallelLayout()
        if self._case.data_ranks > 1:
            layout = ParallelLayout(data=dist.group.WORLD, device=self._device)
        stores = Stores()
        if config.chooses:
            difficulty = DifficultyStore(index, layout.data, device=self._device)
            stores = Stores(self._data if config.needs_reference else None, difficulty)
        return Regate(config, stores, total_steps=ENDLESS, layout=layout)

    @contextmanager
    def ready(self, name: str) -> Iterator[StepParts]:
        """Attach what an arm needs; the block runs its step."""
        arm, session = self._arms[name], self._sessions[name]
        config = arm.config(self._case)
        attachment = attach_model(self._model, config) if arm.attaches else None
        self._stepper.arm = arm.forward
        tokens, plans = [b.tokens for b in as_loaded(self._data.batches)], list[StepPlan]()

        def plan() -> StepPlan:
            plans.append(session.plan_step(tokens))
            return plans[-1]

        try:
            yield StepParts(
                plan, self._passes, partial(self._end, session), lambda: plans[-1].micro
            )
        finally:
            self._clear()
            if attachment is not None:
                attachment.remove()

    def _passes(self, plan: StepPlan | None, on_device: OnDevice) -> Any:
        assert plan is not None
        found = []
        for ids_BT, micro in zip(self._ids, plan.micro, strict=True):
            loss_sum, losses_L = self._run(ids_BT, on_device(micro.to(self._device)))
            if self._engine is None:
                (loss_sum / plan.num_targets_global).backward()
            else:
                scale = self._case.micro_batches * self._case.data_ranks
                self._engine.backward(loss_sum * scale / plan.num_targets_global)
                if len(found) + 1 < self._case.micro_batches:
                    self._engine.step()
            found.append(losses_L)
        return found

    def _run(self, ids_BT: Tensor, plan: ElisionPlan) -> Losses:
        if self._engine is None:
            return self._stepper(ids_BT, plan)
        return self._engine(ids_BT, plan)

    @staticmethod
    def _end(session: Regate, plan: StepPlan | None, found: list[Tensor | None]) -> None:
        """Give the session what it asks for: nothing where nothing is chosen."""
        assert plan is not None
        if not session.config.chooses:
            session.abandon_step()
            return
        for micro, losses_L in zip(plan.micro, found, strict=True):
            assert losses_L is not None
            session.record(micro, losses_L)
        session.finish_step(applied=True)

    def _clear(self) -> None:
        if self._engine is not None:
            self._engine.step()
        self._model.zero_grad(set_to_none=True)


def make_model(case: StepCase, device: torch.device) -> LlamaForCausalLM:
    """Make the case's decoder with random weights, the same on every rank."""
    torch.manual_seed(case.seed)
    model = LlamaForCausalLM(case.llama()).to(device, case.dtype).train()
    if case.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


class _Stepper(nn.Module):
    """Gives an engine one forward pass for all arms."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.arm: Forward | None = None

    def forward(self, ids_BT: Tensor, plan: ElisionPlan) -> Losses:
        assert self.arm is not None
        return self.arm(self.model, ids_BT, plan)


def _engine(case: StepCase, stepper: nn.Module) -> Any:
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": case.samples,
        "gradient_accumulation_steps": case.micro_batches,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": case.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": case.precision == "bf16"},
    }
    # The rate is 0: every turn of every arm starts from the same weights.
    optimizer = torch.optim.SGD(stepper.parameters(), lr=0.0)
    return deepspeed.initialize(model=stepper, optimizer=optimizer, config=settings)[0]
