"""Runs of several steps on two ranks: without elision, and resumed with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from regate_ds import Keyed, Loop, attach
from regate_ds.data.keyed import KeyedCollate
from tests.adapters.torch.loops_helper import shard, whole
from tests.support.models import causal_lm, random_batch
from tests.support.planning import config_of
from tests.support.stores import RandomReference, index_of, read_difficulty

ACCUMULATION = 3
NUM_ITEMS = 14
"""Of one a micro-batch, each rank has seven an epoch: its last step has one."""

EPOCHS, LR = 2, 0.05
DROPPED_STEPS = 2 * EPOCHS
"""Steps of a run with elision, which leaves out a step that is not full."""


class Items:
    """Texts of several lengths, as a user's data set has them."""

    def __init__(self, number: int = NUM_ITEMS) -> None:
        self._number = number

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        ids_BT, tokens = random_batch([[9 + 3 * (number % 5)]], seed=number)
        labels = tokens.labels_BT.roll(1, 1)[0]
        labels[0] = -100
        return {"input_ids": ids_BT[0], "labels": labels}


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def loader_with(collate_fn: Any, *, sampled: bool, number: int = NUM_ITEMS) -> DataLoader[Any]:
    data: Any = Items(number) if collate_fn is collate else Keyed(Items(number), "mine")
    sampler = DistributedSampler(data, shuffle=False) if sampled else None
    return DataLoader(data, sampler=sampler, collate_fn=collate_fn)


def reference() -> RandomReference:
    keyed, data = KeyedCollate(collate), Keyed(Items(), "mine")
    return RandomReference(index_of(keyed([data[n]]).tokens for n in range(NUM_ITEMS)))


def attached(model: nn.Module, **knobs: Any) -> Any:
    config = config_of(**{"warmup": 1, "final_dense_share": 0.0, **knobs})
    stored = reference() if config.enabled else None
    return attach(model, config, total_steps=DROPPED_STEPS, reference=stored)


def wrapped(kind: str, model: nn.Module) -> tuple[Any, Callable[[bool], None]]:
    """The model as the loop calls it, and what tells it whether ranks exchange gradients."""
    if kind == "FSDP2":
        shard(model)
        return model, model.set_requires_gradient_sync  # type: ignore[return-value]
    ddp = DistributedDataParallel(model)
    return ddp, partial(setattr, ddp, "require_backward_grad_sync")


def host_losses(kind: str, model: nn.Module) -> Iterator[Tensor]:
    """A loop that has never heard of us."""
    called, sync = wrapped(kind, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    loader = loader_with(collate, sampled=True)
    for _ in range(EPOCHS):
        for number, batch in enumerate(loader, start=1):
            ends = number % ACCUMULATION == 0 or number == len(loader)
            sync(ends)
            loss = called(**batch).loss / ACCUMULATION
            loss.backward()
            yield loss.detach()
            if ends:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()


class Run:
    """The same loop with ReGATE in it."""

    def __init__(self, kind: str, **knobs: Any) -> None:
        self.model = causal_lm()
        self.regate = attached(self.model, **knobs)
        self.called, self.sync = wrapped(kind, self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR)
        self.loader = loader_with(self.regate.collate(collate), sampled=True)
        self.loop = Loop(accumulation=ACCUMULATION, group=dist.group.WORLD)

    def epoch(self) -> Iterator[Tensor]:
        for window in self.regate.windows(self.loader, self.loop):
            for number, batch in enumerate(window, start=1):
                self.sync(number == len(window))
                loss = self.regate.loss(self.called(**batch))
                loss.backward()
                yield loss.detach()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.regate.step(applied=True)

    def state(self) -> dict[str, Any]:
        """As a loop with torch.distributed.checkpoint has it; ``regate`` has both its methods."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "regate": self.regate}

    def difficulty(self) -> Tensor:
        store = self.regate._opened.difficulty
        return read_difficulty(store, store.index.keys)


def assert_weights_equal(found: nn.Module, wanted: nn.Module) -> None:
    for (name, mine), theirs in zip(found.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(whole(mine), whole(theirs)), name


def check_disabled(rank: int, folder: Path, kind: str) -> None:
    host, run = causal_lm(), Run(kind, enabled=False)
    wanted = list(host_losses(kind, host))
    found = [loss for _ in range(EPOCHS) for loss in run.epoch()]
    assert torch.equal(torch.stack(found), torch.stack(wanted))
    assert_weights_equal(run.model, host)


def check_resumed(rank: int, folder: Path, kind: str) -> None:
    """Through torch.distributed.checkpoint."""
    run = Run(kind)
    list(run.epoch())
    dcp.save(run.state(), checkpoint_id=folder / kind)
    torch.save(run.difficulty(), folder / f"{kind}-difficulty-of-rank-{rank}.pt")
    wanted = list(run.epoch())
    resumed = Run(kind)
    state = resumed.state()
    dcp.load(state, checkpoint_id=folder / kind)
    set_state_dict(
        resumed.model,
        resumed.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    assert torch.equal(torch.stack(list(resumed.epoch())), torch.stack(wanted))
    assert resumed.regate.metrics() == run.regate.metrics()
    assert run.regate.metrics()["step"] == DROPPED_STEPS - 1
    assert_weights_equal(resumed.model, run.model)
    difficulty = run.difficulty()
    assert bool(difficulty.any())
    assert torch.equal(resumed.difficulty(), difficulty)


class Accelerated:
    """A loop of accelerate, with or without ReGATE, around its own loader."""

    def __init__(self, *, plain: bool = False, number: int = NUM_ITEMS, **knobs: Any) -> None:
        self.model = causal_lm()
        self.regate = None if plain else attached(self.model, **knobs)
        self.accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION, cpu=True)
        collate_fn = collate if self.regate is None else self.regate.collate(collate)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR)
        self.called, self.optimizer, self.loader = self.accelerator.prepare(
            self.model, optimizer, loader_with(collate_fn, sampled=False, number=number)
        )
        if self.regate is not None:
            self.accelerator.register_for_checkpointing(self.regate)
        self.num_steps = 0

    def epoch(self) -> Iterator[Tensor]:
        if self.regate is None:
            for batch in self.loader:
                yield self._run(batch)
            return
        for window in self.regate.windows(self.loader, self.accelerator):
            for batch in window:
                yield self._run(batch)
            self.regate.step(applied=not self.optimizer.step_was_skipped)

    def _run(self, batch: dict[str, Tensor]) -> Tensor:
        with self.accelerator.accumulate(self.called):
            output = self.called(**batch)
            loss = output.loss if self.regate is None else self.regate.loss(output)
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.num_steps += 1
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()

    difficulty = Run.difficulty


def check_accelerate_disabled(rank: int, folder: Path) -> None:
    host, run = Accelerated(plain=True), Accelerated(enabled=False)
    wanted = [loss for _ in range(EPOCHS) for loss in host.epoch()]
    found = [loss for _ in range(EPOCHS) for loss in run.epoch()]
    assert torch.equal(torch.stack(found), torch.stack(wanted))
    assert run.num_steps == host.num_steps == 3 * EPOCHS
    assert_weights_equal(run.model, host.model)


def check_accelerate_resumed(rank: int, folder: Path) -> None:
    """Through accelerate's own checkpoints; each step is one of the optimizer's, the last of an
    epoch too."""
    number = 2 * 2 * ACCUMULATION
    run = Accelerated(number=number)
    list(run.epoch())
    run.accelerator.save_state(str(folder / "accelerate"))
    wanted = list(run.epoch())
    assert run.num_steps == DROPPED_STEPS
    resumed = Accelerated(number=number)
    resumed.accelerator.load_state(str(folder / "accelerate"))
    assert torch.equal(torch.stack(list(resumed.epoch())), torch.stack(wanted))
    assert_weights_equal(resumed.model, run.model)
    assert torch.equal(resumed.difficulty(), run.difficulty())


RUNS: dict[str, Callable[[int, Path], None]] = {
    **{
        f"{kind}, disabled: losses and weights are a plain loop's, bit for bit": (
            partial(check_disabled, kind=kind)
        )
        for kind in ("DDP", "FSDP2")
    },
    **{
        f"{kind}, resumed by torch.distributed.checkpoint: as if never stopped": (
            partial(check_resumed, kind=kind)
        )
        for kind in ("DDP", "FSDP2")
    },
    "accelerate, disabled: losses and weights are a plain loop's, bit for bit": (
        check_accelerate_disabled
    ),
    "accelerate, resumed by its own checkpoint: as if never stopped": check_accelerate_resumed,
}
