"""Run one optimizer step through Megatron's schedule, with a plan for each micro-batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor, nn

from regate_ds.adapters.megatron.communicator import (
    Boundary,
    PlannedCommunicator,
    micro_order,
    shapes,
)
from regate_ds.adapters.megatron.gates import ChunkGate
from regate_ds.adapters.megatron.groups import Axes, schedule_groups
from regate_ds.adapters.megatron.local.plan import LocalPlan


class StepRun:
    """One rank's run of a step: its plans, its losses and the bytes that it sends."""

    def __init__(self, micro: Sequence[LocalPlan], gates: Sequence[ChunkGate], axes: Axes) -> None:
        self.micro = micro
        self.losses: dict[int, Tensor] = {}
        """Losses of this context rank's targets, by micro-batch; empty except on the last stage."""

        self.entropies: dict[int, Tensor] = {}
        """Entropies there, where the score asks for them."""

        self.communicator: PlannedCommunicator | None = None
        self._gates, self._axes = gates, axes
        self._gated = gates[0].range_of(micro[0])
        self._num_started = [0] * len(gates)
        self._chunk_numbers: dict[int, int] = {}

    def call(self, schedule: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Run the host's schedule with our communicator and forward step."""
        forward_step = arguments["forward_step_func"]

        def planned_step(iterator: Any, model: nn.Module, *rest: Any) -> Any:
            return self._forward_step(forward_step, iterator, model, *rest)

        replaced = {"forward_step_func": planned_step}
        if self._axes.pipeline_size > 1:
            # Megatron's own communicator may be replaced, as ours connects the same stages.
            given = type(arguments.get("p2p_communicator"))
            if given not in (type(None), P2PCommunicator):
                raise ValueError(
                    f"p2p_communicator is a {given.__name__} of your own; leave it out, as regate "
                    "needs its own, which knows the shapes"
                )
            groups = arguments.get("pg_collection") or schedule_groups()
            self.communicator = self._communicator(groups)
            if (channel := self._gated.channel) is not None:
                channel.num_bytes_sent = 0
            replaced |= {"p2p_communicator": self.communicator, "pg_collection": groups}
        result = schedule(**{**arguments, **replaced})
        if (channel := self._gated.channel) is not None:
            channel.finish()
        return result

    def _communicator(self, groups: Any) -> PlannedCommunicator:
        config = self._gates[0].gpt.config
        stage, axes = torch.distributed.get_rank(groups.pp), self._axes
        arriving, returning = micro_order(
            len(self.micro),
            stage,
            axes.pipeline_size,
            axes.virtual_size,
            getattr(config, "microbatch_group_size_per_vp_stage", None) or axes.pipeline_size,
        )
        edge = self.boundary()
        hidden = config.hidden_size
        return PlannedCommunicator(
            groups.pp,
            config,
            shapes(self.micro, arriving, edge.packed_before, hidden),
            shapes(self.micro, returning, edge.packed_after, hidden),
        )

    def boundary(self) -> Boundary:
        """Return which edges of this stage only kept rows cross."""
        gated = self._gated
        if not self.micro[0].moves_rows:
            return Boundary(packed_before=False, packed_after=False)
        if self._axes.virtual_size > 1:
            # The gather is in the model's first chunk, so all edges come after it.
            return Boundary(packed_before=True, packed_after=True)
        layers = self._gates[0].layers
        # The restore happens on the stage of layer last, after the edge before that layer; the
        # gather happens on the stage of layer first - 1, before the edge after that layer.
        return Boundary(
            packed_before=gated.first <= layers[0] <= gated.last,
            packed_after=gated.first <= layers[-1] + 1 <= gated.last,
        )

    def gathered_bytes(self) -> int:
        """Return the bytes of kept rows that this rank sends in one move to ranks of its sequence.

        The sum is over the micro-batches of the step.
        """
        config, rank = self._gates[0].gpt.config, self._axes.place.rank
        routes = [local.gather for local in self.micro if local.gather is not None]
        size = config.hidden_size * torch.finfo(config.params_dtype).bits // 8
        return sum(route.num_crossing(rank) for route in routes) * size

    def sent_bytes(self) -> int:
        """Return the bytes that this rank has sent to other stages in the step."""
        channel = self._gated.channel
        by_channel = 0 if channel is None else channel.num_bytes_sent
        return by_channel + (0 if self.communicator is None else self.communicator.num_bytes_sent)

    def expected_bytes(self) -> tuple[int, int]:
        """Return the bytes that this stage sends in a step according to the plan.

        The first number is of activations onward, the second of gradients back.
        """
        if self._axes.pipeline_size == 1:
            return 0, 0
        config, edge = self._gates[0].gpt.config, self.boundary()
        size = config.hidden_size * torch.finfo(config.pipeline_dtype).bits // 8

        def rows(packed: bool) -> int:
            return sum(math.prod(m.kept_shape if packed else m.full_shape) for m in self.micro)

        stage, chunks = mpu.get_pipeline_model_parallel_rank(), self._axes.virtual_size
        # The model's last chunk sends no activation, its first no gradient.
        onward = chunks - (stage == self._axes.pipeline_size - 1)
        back = chunks - (stage == 0)
        gated, layers = self._gated, self._gates[0].layers
        elided_rows = [m.elided_N for m in self.micro if m.elided_N is not None]
        elided = sum(map(len, elided_rows)) if gated.channel is not None else 0
        restores = gated.last in layers
        return (
            (onward * rows(edge.packed_after) + elided * (not restores)) * size,
            (back * rows(edge.packed_before) + elided * restores) * size,
        )

    def _forward_step(
        self, forward_step: Callable[..., Any], iterator: Any, model: nn.Module, *rest: Any
    ) -> tuple[Any, Callable[[Tensor], Any]]:
        """Run the host's forward step with the chunk's next plan, and replace its loss function."""
        # A schedule gives each chunk its micro-batches in order.
        chunk = self._chunk_of(model)
        gate, number = self._gates[chunk], self._num_started[chunk]
        self._num_started[chunk] += 1
        gate.pending, tap = self.micro[number], gate.entropy
        if tap is not None:
            tap.open()
        try:
            output, host_loss = forward_step(iterator, model, *rest)
        finally:
            # A plan that the model did not take would otherwise be used by a later evaluation.
            was_called, gate.pending = gate.pending is None, None
            entropy_P = None if tap is None else tap.close()
        if not was_called:
            raise RuntimeError(
                f"the forward step of micro-batch {number} did not call the model; make it call "
                "the model exactly once"
            )
        if not gate.gpt.post_process:
            return output, host_loss
        if tap is not None:
            self._remember_entropy(number, entropy_P)
        return output, lambda losses: self._loss(number, losses)

    def _remember_entropy(self, number: int, entropy_P: Tensor | None) -> None:
        if entropy_P is None:
            raise RuntimeError(
                f"the model computed the loss of micro-batch {number} without "
                "compute_language_model_loss, so that score=entropy cannot be recorded; use "
                "another score, or a GPTModel that calls it"
            )
        self.entropies[number] = self.micro[number].of_targets(entropy_P)

    def _chunk_of(self, model: nn.Module) -> int:
        """Return the number of a chunk; ValueError if regate is not attached to it."""
        if id(model) not in self._chunk_numbers:
            inside = set(map(id, model.modules()))
            found = [i for i, gate in enumerate(self._gates) if id(gate.gpt) in inside]
            if not found:
                raise ValueError(
                    f"the schedule is given a {type(model).__name__} that regate is not attached "
                    "to; attach to the chunks that the schedule is given"
                )
            self._chunk_numbers[id(model)] = found[0]
        return self._chunk_numbers[id(model)]

    def _loss(self, number: int, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the sum of losses over this rank's targets, their number, and both for the log.

        Megatron sums the numbers over micro-batches, data ranks and context ranks, and divides by
        that sum.
        """
        count = self.micro[number].num_targets
        losses_L = self.micro[number].of_targets(losses.float().reshape(-1))
        self.losses[number] = losses_L.detach()
        weight_P = self.micro[number].weight_P
        total = (losses_L if weight_P is None else losses_L * weight_P[:count]).sum()
        num_tokens = torch.tensor(count, dtype=torch.int, device=losses.device)
        report = torch.stack([total.detach(), num_tokens.to(total.dtype)])
        return total, num_tokens, {"lm loss": report}
