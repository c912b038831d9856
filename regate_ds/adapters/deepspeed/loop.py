"""ReGATE in a training loop of your own around a DeepSpeed engine with ZeRO stage 0 to 3.

    regate = attach(model, RegateConfig(), total_steps=T, reference=ReferenceStore(path))
    engine, _, loader, _ = deepspeed.initialize(model=model, ...)
    for window in regate.windows(loader, engine):
        for batch in window:  # its plan lies in it
            output = engine(**batch)
            engine.backward(regate.loss(output))
            engine.step()
        regate.step(applied=engine.was_step_applied())

A window is the micro-batches of one optimizer step, which are planned together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regate_ds.adapters.attachment import Attachment
from regate_ds.adapters.computed import Computed
from regate_ds.adapters.deepspeed.checks import LoopOptions, record_output, require_engine
from regate_ds.adapters.huggingface.gates import ElidedOutput
from regate_ds.adapters.run import metrics_of
from regate_ds.adapters.session_state import Opened, open_session, read_state
from regate_ds.adapters.window import Window, in_steps, require_collated, window_tokens
from regate_ds.algorithm.plan import StepPlan
from regate_ds.config import RegateConfig, require_steps
from regate_ds.data.keyed import KeyedCollate, PlainCollate
from regate_ds.parallel.layout import ParallelLayout
from regate_ds.teacher.online import OnlineReference


class DeepSpeedRegate:
    """The plan, the loss and the state of one training run; made by ``attach``."""

    def __init__(
        self,
        config: RegateConfig,
        attachment: Attachment,
        *,
        total_steps: int | None,
        computed: Computed,
        options: LoopOptions,
    ) -> None:
        """total_steps: None where the loop tells it before the first window."""
        self.config, self.total_steps = config, total_steps
        self.plan: StepPlan | None = None
        """The plan of the current step, or of the last one."""
        self._computed, self._attachment, self._options = computed, attachment, options
        self._opened: Opened | None = None
        self._engine: Any = None
        self._load_from: Path | None = None
        self._teacher_seconds = 0.0

    def collate(self, collate_fn: Callable[[list[Any]], Any]) -> KeyedCollate | PlainCollate:
        """Wrap your collate function; the items need a ``regate_key``, which ``Keyed`` adds."""
        if not self.config.enabled:
            return PlainCollate(collate_fn)
        return KeyedCollate(collate_fn, self._options.number_images)

    def windows(self, loader: Iterable[Any], engine: Any = None) -> Iterator[Window]:
        """Yield the loader's micro-batches in groups of one optimizer step, each with its plan.

        engine: handed over at the first call; later calls may leave it out.

        Micro-batches at the end that do not fill a step are left out, because a window never
        crosses an epoch. A loader that keeps its order, as DeepSpeed's own does, leaves out the
        same samples each time, unless you call ``loader.data_sampler.set_epoch(epoch)``.

        With enabled=False the batch is the host's own, and nothing is left out. With an online
        teacher the loader is read one window ahead.
        """
        engine = self._bind(engine)
        size = engine.gradient_accumulation_steps()
        groups = in_steps(loader, size, keep_rest=not self.config.enabled)
        next_micro = self._next(groups)
        while next_micro is not None:
            window = self._window(next_micro)
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
        """Let an online teacher score the step that is planned next, if it ranks answers."""
        if self._online is not None:
            require_collated(micro)
            session = self._require_opened().session
            ranks = session.chooses_answers(session.coming_step)
            self._online.prepare(micro) if ranks else self._online.forget()

    def window(self, micro: list[Any], engine: Any) -> Window:
        """Plan one step's micro-batches, for loops that read the loader themselves.

        Collective over data ranks.
        """
        self._bind(engine)
        self._prepare(micro)
        return self._window(micro)

    def loss(self, output: Any) -> Tensor:
        """Return the loss of a micro-batch, to give to ``engine.backward``.

        It is scaled so that the engine's average over micro-batches and data ranks is the mean over
        all targets of the step; the loss of one micro-batch alone is not a mean. The model's
        auxiliary loss is added unscaled. With enabled=False it is the host's own loss.
        """
        if not self.config.enabled:
            return output.loss
        record_output(output, self._require_opened().session)
        loss = output.loss_sum * self._scale()
        return loss if output.aux_loss is None else loss + output.aux_loss

    def token_losses(self, output: ElidedOutput) -> tuple[Tensor, Tensor]:
        """Return each kept target's loss [L] in nats, and its weight in ``loss`` [L].

        Use it to compute a loss of your own; ``(losses * weights).sum()`` is what ``loss`` returns,
        without the auxiliary loss.

        RuntimeError unless ``attach`` was called with own_loss=True.
        """
        if not self._options.own_loss:
            raise RuntimeError(
                "token_losses needs attach(..., own_loss=True), but the model was attached with "
                "own_loss=False; attach it anew"
            )
        plan = record_output(output, self._require_opened().session)
        assert output.losses is not None
        weights = torch.full_like(output.losses, self._scale())
        return output.losses, weights if plan.weight_L is None else weights * plan.weight_L

    def step(self, *, applied: bool) -> None:
        """End an optimizer step; ``applied`` is ``engine.was_step_applied()``.

        Collective over data ranks.
        """
        if self._opened is not None:
            self._opened.session.finish_step(applied=applied)

    def save(self, checkpoint_dir: str | Path) -> None:
        """Write schedule and difficulty into a checkpoint folder. Every data rank must call it."""
        if self.config.enabled:
            self._require_opened().save(checkpoint_dir)

    def load(self, checkpoint_dir: str | Path) -> None:
        """Load what ``save`` wrote; the number of data ranks may differ from the saved one.

        Before the engine is known the checkpoint is only looked at, and loaded with the first
        window. Every data rank must call it.
        """
        if not self.config.enabled:
            return
        read_state(checkpoint_dir)
        self._load_from = Path(checkpoint_dir)
        self._load()

    def metrics(self) -> dict[str, Any]:
        """Return counts of the step planned last, over all data ranks (see ``metrics_of``).

        With an online teacher, teacher_seconds is the time of scoring this step's samples on this
        rank.
        """
        cost = {} if self._online is None else {"teacher_seconds": self._teacher_seconds}
        return metrics_of(self) | cost

    def remove(self) -> None:
        """Leave the model as it was before ``attach``: what follows is the host's own run."""
        self._attachment.remove()
        self.config, self._opened, self.plan = replace(self.config, enabled=False), None, None

    def _bind(self, engine: Any) -> Any:
        """Open the session for the engine, once; return the engine."""
        if engine is None:
            if self._engine is None:
                raise ValueError(
                    "no engine is known (engine=None); hand it over at the first call: "
                    "regate.windows(loader, engine)"
                )
            return self._engine
        if self._engine not in (None, engine):
            raise RuntimeError("this attachment serves another engine already; attach once per run")
        if self._engine is None and self.config.enabled:
            require_engine(engine, self._options)
            self._open(engine)
        self._engine = engine
        return engine

    def _open(self, engine: Any) -> None:
        require_steps(self.total_steps)
        assert self.total_steps is not None
        group = engine.data_parallel_group if engine.dp_world_size > 1 else None
        layout = ParallelLayout(data=group, device=engine.device)
        total_steps = self.total_steps
        self._opened = open_session(self.config, self._computed, layout, total_steps=total_steps)
        self._load()

    def _load(self) -> None:
        """Load what ``load`` was given, as soon as there is a session."""
        if self._opened is not None and self._load_from is not None:
            self._opened.load(self._load_from)
            self._load_from = None

    @property
    def _online(self) -> OnlineReference | None:
        """The online teacher; None without one, or if the score needs no reference."""
        found = self._computed.reference if self.config.needs_reference else None
        return found if isinstance(found, OnlineReference) else None

    def _window(self, micro: list[Any]) -> Window:
        device = self._engine.device
        if not self.config.enabled:
            return Window(micro, [None] * len(micro), device)
        if self._online is not None:
            self._teacher_seconds = self._online.seconds
        session, calls = self._require_opened().session, self._options.calls_under(self._engine)
        self.plan = session.plan_step(lambda: window_tokens(micro), lambda: calls.tally(micro))
        agreed = calls.agreed(self.plan.tallies, self._engine.dp_world_size)
        return Window(micro, self.plan.micro, device, agreed)

    def _require_opened(self) -> Opened:
        if self._opened is None:
            raise RuntimeError(
                f"no engine is known yet (enabled={self.config.enabled}): first iterate over "
                "regate.windows(loader, engine), with enabled=True in RegateConfig"
            )
        return self._opened

    def _scale(self) -> float:
        """Return the factor by which the sum of a micro-batch's losses is multiplied."""
        assert self.plan is not None
        engine = self._engine
        engine_divisor = engine.dp_world_size * engine.gradient_accumulation_steps()
        return engine_divisor / self.plan.num_targets_global
