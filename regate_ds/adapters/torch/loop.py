"""ReGATE in a training loop of your own.

    regate = attach(model, RegateConfig(), total_steps=T, reference=ReferenceStore(path))
    for window in regate.windows(loader, Loop(accumulation=4)):
        for batch in window:  # its plan lies in it
            regate.loss(model(**batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        regate.step(applied=True)

A window is the micro-batches of one optimizer step, which are planned together. In place of the
``Loop`` may stand an ``Accelerator`` or a DeepSpeed engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regate_ds.adapters.attachment import Attachment
from regate_ds.adapters.computed import Computed
from regate_ds.adapters.figures import Figures
from regate_ds.adapters.huggingface.gates import ElidedOutput
from regate_ds.adapters.run import metrics_of
from regate_ds.adapters.session_state import open_session
from regate_ds.adapters.torch.checks import (
    LoopOptions,
    record_output,
    require_loop_ranks,
    warn_if_not_loaded,
)
from regate_ds.adapters.torch.host import LoopHost, averaged, gradient_scale
from regate_ds.adapters.torch.hosts import host_of
from regate_ds.adapters.torch.late_state import LateState, Stateful
from regate_ds.adapters.window import Window, in_steps, require_collated, window_tokens
from regate_ds.algorithm.plan import StepPlan
from regate_ds.config import RegateConfig, require_steps
from regate_ds.data.keyed import KeyedCollate, PlainCollate
from regate_ds.parallel.layout import ParallelLayout
from regate_ds.teacher.online import OnlineReference


class LoopRegate(Stateful):
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
        self._state, self._figures = LateState(), Figures()
        self._host: LoopHost | None = None
        self._teacher_seconds = 0.0

    def collate(self, collate_fn: Callable[[list[Any]], Any]) -> KeyedCollate | PlainCollate:
        """Wrap your collate function; the items need a ``regate_key``, which ``Keyed`` adds."""
        if not self.config.enabled:
            return PlainCollate(collate_fn)
        return KeyedCollate(collate_fn, self._options.number_images)

    def windows(self, loader: Iterable[Any], host: Any = None) -> Iterator[Window]:
        """Yield the loader's micro-batches in groups of one optimizer step, each with its plan.

        host: a DeepSpeed engine, an ``Accelerator`` or a ``Loop``. It is handed over at the first
            call; later calls may leave it out.

        Micro-batches at the end that do not fill a step are left out, because a window never
        crosses an epoch. A loader that keeps its order leaves out the same samples each time.

        With enabled=False the batch is the host's own, and nothing is left out. With an online
        teacher the loader is read one window ahead.
        """
        bound, reads_ahead = self._bind(host), self._online is not None
        groups = in_steps(loader, bound.accumulation, keep_rest=not self.config.enabled)
        next_micro = self._next(groups)
        while next_micro is not None:
            window = self._window(next_micro)
            if reads_ahead:
                next_micro = self._next(groups)
            bound.begin(len(window))
            yield window
            if not reads_ahead:
                next_micro = self._next(groups)

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

    def window(self, micro: list[Any], host: Any) -> Window:
        """Plan one step's micro-batches, for loops that read the loader. Collective."""
        self._bind(host).begin(len(micro))
        self._prepare(micro)
        return self._window(micro)

    def loss(self, output: Any) -> Tensor:
        """Return the loss of a micro-batch, for the backward pass; do not divide it.

        It is scaled so that, by what the host divides by, the step's gradient is that of the mean
        over all its targets; the loss of one micro-batch alone is not a mean. The model's auxiliary
        loss is averaged over micro-batches and ranks. With enabled=False it is the host's own loss,
        in a ``Loop`` divided by its accumulation.
        """
        if not self.config.enabled:
            return output.loss if self._host is None else averaged(output.loss, self._host)
        record_output(output, self._require_opened().session)
        loss = output.loss_sum * self._scale()
        if output.aux_loss is None:
            return loss
        assert self._host is not None
        return loss + averaged(output.aux_loss, self._host, self.plan)

    def token_losses(self, output: ElidedOutput) -> tuple[Tensor, Tensor]:
        """Return each kept target's loss [L] in nats, and its weight in ``loss`` [L].

        For a loss of your own; ``(losses * weights).sum()`` is what ``loss`` returns, without the
        auxiliary loss. RuntimeError unless ``attach`` was called with own_loss=True.
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
        """End an optimizer step; ``applied``: whether the weights changed, as
        ``engine.was_step_applied()`` or ``not optimizer.step_was_skipped`` says; else True.

        Collective over data ranks.
        """
        if self._opened is not None:
            self._opened.session.finish_step(applied=applied)
            self._figures.end(self.metrics(), self._opened.session.switch_figures)

    def metrics(self) -> dict[str, Any]:
        """Return counts of the step planned last, over all data ranks (see ``metrics_of``).

        With an online teacher, teacher_seconds is the time of scoring this step's samples on this
        rank.
        """
        cost = {} if self._online is None else {"teacher_seconds": self._teacher_seconds}
        return metrics_of(self) | cost

    def figures(self) -> dict[str, float]:
        """Return shares and seconds of the step that ended last, for any logger: see ``Figures``;
        empty before, and with enabled=False. Add them to ``metrics``.
        """
        return self._figures.last

    def remove(self) -> None:
        """Leave the model as it was before ``attach``: what follows is the host's own run."""
        self._attachment.remove()
        self.config, self._state, self.plan = replace(self.config, enabled=False), LateState(), None

    def _bind(self, given: Any) -> LoopHost:
        """Open the session for the host, once; return the host."""
        host = host_of(given, self._host, self._options.model)
        if self._host is None and self.config.enabled:
            host.require()
            require_loop_ranks(host, self._options)
            self._open(host)
        self._host = host
        return host

    def _open(self, host: LoopHost) -> None:
        total_steps = self.total_steps
        require_steps(total_steps)
        assert total_steps is not None
        layout = ParallelLayout(data=host.group, device=host.device)
        opened = open_session(self.config, self._computed, layout, total_steps=total_steps)
        self._state.open(opened)
        warn_if_not_loaded(host, opened.session)

    @property
    def _online(self) -> OnlineReference | None:
        """The online teacher; None without one, or if the score needs no reference."""
        found = self._computed.reference if self.config.needs_reference else None
        return found if isinstance(found, OnlineReference) else None

    def _window(self, micro: list[Any]) -> Window:
        host = self._host
        assert host is not None
        if not self.config.enabled:
            return Window(micro, [None] * len(micro), host.device)
        host.require_boundary()
        self._figures.begin()
        if self._online is not None:
            self._teacher_seconds = self._online.seconds
        session, calls = self._require_opened().session, self._options.calls_under(host)
        self.plan = session.plan_step(lambda: window_tokens(micro), lambda: calls.tally(micro))
        agreed = calls.agreed(self.plan.tallies, host.num_ranks)
        return Window(micro, self.plan.micro, host.device, agreed)

    def _scale(self) -> float:
        """Return the factor by which the sum of a micro-batch's losses is multiplied."""
        assert self._host is not None
        assert self.plan is not None
        return gradient_scale(self._host) / self.plan.num_targets_global
