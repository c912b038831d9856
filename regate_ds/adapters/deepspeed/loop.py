"""ReGATE in a training loop of your own around a DeepSpeed engine with ZeRO stage 0 to 3.

    regate = attach(model, RegateConfig(total_steps=T), reference=ReferenceStore(path))
    engine, _, loader, _ = deepspeed.initialize(model=model, ...)
    for window in regate.windows(loader, engine):
        for batch, plan in window:
            output = engine(**batch, regate_plan=plan)
            engine.backward(regate.loss(output, plan))
            engine.step()
        regate.step(applied=engine.was_step_applied())

A window is the micro-batches of one optimizer step, which are planned together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from regate_ds.adapters.attachment import Attachment
from regate_ds.adapters.deepspeed.checks import require_elided
from regate_ds.adapters.huggingface.gates import ElidedOutput
from regate_ds.adapters.session_state import Difficulty, load_state, open_session, save_state
from regate_ds.adapters.window import Window, in_steps, require_collated
from regate_ds.algorithm.plan import ElisionPlan, StepPlan
from regate_ds.config import RegateConfig
from regate_ds.data.keyed import KeyedCollate, PlainCollate
from regate_ds.parallel.layout import ParallelLayout
from regate_ds.session import Regate
from regate_ds.stores.reference.reader import ReferenceStore
from regate_ds.teacher.online import OnlineReference


class DeepSpeedRegate:
    """The plan, the loss and the state of one training run; made by ``attach``."""

    def __init__(
        self,
        config: RegateConfig,
        reference: ReferenceStore | OnlineReference | None,
        attachment: Attachment,
        *,
        own_loss: bool,
        tower_unwatched: bool,
    ) -> None:
        self.config = config
        self.plan: StepPlan | None = None
        """The plan of the current step, or of the last one."""
        self._reference, self._attachment, self._own_loss = reference, attachment, own_loss
        self._tower_unwatched = tower_unwatched
        self._session: Regate | None = None
        self._difficulty: Difficulty | None = None
        self._engine: Any = None
        self._teacher_seconds = 0.0

    def collate(self, collate_fn: Callable[[list[Any]], Any]) -> KeyedCollate | PlainCollate:
        """Wrap your collate function; the items need a ``regate_key``, which ``Keyed`` adds."""
        return KeyedCollate(collate_fn) if self.config.enabled else PlainCollate(collate_fn)

    def windows(self, loader: Iterable[Any], engine: Any) -> Iterator[Window]:
        """Yield the loader's micro-batches in groups of one optimizer step, with their plans.

        Micro-batches at the end that do not fill a step are left out, because a window never
        crosses an epoch. A loader that keeps its order, as DeepSpeed's own does, leaves out the
        same samples each time, unless you call ``loader.data_sampler.set_epoch(epoch)``.

        With enabled=False every plan is None, the batch is the host's own, and nothing is left
        out. With an online teacher the loader is read one window ahead.
        """
        self._bind(engine)
        size = engine.gradient_accumulation_steps()
        groups = in_steps(loader, size, keep_rest=not self.config.enabled)
        next_micro = self._next(groups)
        while next_micro is not None:
            window = self._window(next_micro, engine)
            if self._online is None:
                yield window
                next_micro = self._next(groups)
            else:
                next_micro = self._next(groups)
                yield window

    def _next(self, groups: Iterator[list[Any]]) -> list[Any] | None:
        """Return the micro-batches of the next window, scored if an online teacher must do so."""
        micro = next(groups, None)
        if micro is not None:
            self._prepare(micro)
        return micro

    def _prepare(self, micro: list[Any]) -> None:
        """Let an online teacher score the step that is planned next, unless it is dense."""
        if self._online is None:
            return
        require_collated(micro)
        session = self._open_session()
        if session.is_dense(session.coming_step):
            self._online.forget()
        else:
            self._online.prepare(micro)

    def window(self, micro: list[Any], engine: Any) -> Window:
        """Plan one step's micro-batches, for loops that read the loader themselves.

        Collective over data ranks.
        """
        self._bind(engine)
        self._prepare(micro)
        return self._window(micro, engine)

    def loss(self, output: Any, plan: ElisionPlan | None) -> Tensor:
        """Return the loss of a micro-batch, to give to ``engine.backward``.

        It is scaled so that the engine's average over micro-batches and data ranks is the mean over
        all targets of the step; the loss of one micro-batch alone is not a mean. The model's
        auxiliary loss is added unscaled. With plan=None it is the host's own loss.
        """
        if plan is None:
            return output.loss
        require_elided(output)
        self._open_session().record(plan, output.losses)
        loss = output.loss_sum * self._scale()
        return loss if output.aux_loss is None else loss + output.aux_loss

    def token_losses(self, output: ElidedOutput, plan: ElisionPlan) -> tuple[Tensor, Tensor]:
        """Return each kept target's loss [L] in nats, and its weight in ``loss`` [L].

        Use it to compute a loss of your own; ``(losses * weights).sum()`` is what ``loss`` returns,
        without the auxiliary loss.

        RuntimeError unless ``attach`` was called with own_loss=True.
        """
        if not self._own_loss:
            raise RuntimeError(
                "token_losses needs attach(..., own_loss=True), but the model was attached with "
                "own_loss=False; attach it anew"
            )
        require_elided(output)
        assert output.losses is not None
        self._open_session().record(plan, output.losses)
        return output.losses, torch.full_like(output.losses, self._scale())

    def step(self, *, applied: bool) -> None:
        """End an optimizer step; ``applied`` is ``engine.was_step_applied()``.

        Collective over data ranks.
        """
        if self._session is not None:
            self._session.finish_step(applied=applied)

    def save(self, checkpoint_dir: str | Path) -> None:
        """Write schedule and difficulty into a checkpoint folder. Every data rank must call it."""
        if not self.config.enabled:
            return
        session = self._open_session()
        save_state(checkpoint_dir, session, self._difficulty, is_first=_rank() == 0)

    def load(self, checkpoint_dir: str | Path, engine: Any) -> None:
        """Load what ``save`` wrote; the number of data ranks may differ from the saved one."""
        if not self.config.enabled:
            return
        self._bind(engine)
        load_state(checkpoint_dir, self._open_session(), self._difficulty)

    def metrics(self) -> dict[str, int | bool | float]:
        """Return counts of the step planned last, over all data ranks, for any logger.

        tokens_total and answer_total count all positions and all label positions of the step;
        tokens_kept and answer_kept count those of them that are kept. filled counts positions kept
        only to reach token_multiple, and padded counts slots without a token. With an online
        teacher, teacher_seconds is the time of scoring this step's samples on this rank. With
        enabled=False the result is empty.

        RuntimeError before the first step is planned.
        """
        if not self.config.enabled:
            return {}
        if self.plan is None:
            raise RuntimeError(
                "no step is planned yet, so there are no counts; call metrics() inside or after "
                "regate.windows(loader, engine)"
            )
        cost = {} if self._online is None else {"teacher_seconds": self._teacher_seconds}
        return {"step": self.plan.step, "dense": self.plan.is_dense, **self.plan.counts, **cost}

    def remove(self) -> None:
        """Leave the model as it was before ``attach``."""
        self._attachment.remove()

    def _bind(self, engine: Any) -> None:
        if self._engine is engine or not self.config.enabled:
            return
        if self._engine is not None:
            raise RuntimeError("this attachment serves another engine already; attach once per run")
        if engine.sequence_parallel_size > 1:
            raise ValueError(
                f"sequence parallel size {engine.sequence_parallel_size} is not supported under "
                "DeepSpeed; set it to 1"
            )
        if engine.dp_world_size > 1 and self._tower_unwatched:
            raise RuntimeError(
                f"the engine has {engine.dp_world_size} data ranks, but attach found one rank: "
                "a rank without an image would stop the others; call "
                "deepspeed.init_distributed() before attach"
            )
        self._engine = engine
        group = engine.data_parallel_group if engine.dp_world_size > 1 else None
        self._session, self._difficulty = open_session(
            self.config, self._reference, ParallelLayout(data=group), engine.device
        )

    @property
    def _online(self) -> OnlineReference | None:
        """The online teacher; None without one, or if the configuration elides nothing."""
        found = self._reference if self.config.keep_share < 1.0 and self.config.enabled else None
        return found if isinstance(found, OnlineReference) else None

    def _window(self, micro: list[Any], engine: Any) -> Window:
        if not self.config.enabled:
            return Window(micro, [None] * len(micro), engine.device)
        require_collated(micro)
        if self._online is not None:
            self._teacher_seconds = self._online.seconds
        self.plan = self._open_session().plan_step([batch.tokens for batch in micro])
        return Window(micro, self.plan.micro, engine.device)

    def _open_session(self) -> Regate:
        if self._session is None:
            raise RuntimeError(
                f"no engine is known yet (enabled={self.config.enabled}): first iterate over "
                "regate.windows(loader, engine), with enabled=True in RegateConfig"
            )
        return self._session

    def _scale(self) -> float:
        """Return the factor by which the sum of a micro-batch's losses is multiplied."""
        assert self.plan is not None
        engine = self._engine
        engine_divisor = engine.dp_world_size * engine.gradient_accumulation_steps()
        return engine_divisor / self.plan.num_targets_global


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
