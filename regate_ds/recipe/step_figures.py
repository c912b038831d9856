"""The figures of a training step: loss, counts, seconds, memory."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from regate_ds.adapters.huggingface.mlp import mlp_share
from regate_ds.algorithm.batch import IMAGE, TokenBatch
from regate_ds.algorithm.plan import StepPlan
from regate_ds.config import RegateConfig
from regate_ds.data.collate import Batch
from regate_ds.job.process import Process
from regate_ds.parallel.collectives import sum_over
from regate_ds.recipe.engines.base import Engine


class StepFigures:
    """Measures one optimizer step after the other; ``mean_loss`` and ``row`` are collective."""

    def __init__(
        self,
        engine: Engine,
        process: Process,
        data: Process,
        flops: Callable[[StepPlan | None, Sequence[TokenBatch]], float],
    ) -> None:
        """Take this process among all ranks, and among those that read different samples.

        flops: those of a step's micro-batches on this data rank.
        """
        self._engine, self._process, self._data = engine, process, data
        self._flops = flops
        self._seen: list[TokenBatch] = []
        self._num_micro = 0
        self.must_stop = False
        """Whether any rank had been asked to end the run when the last loss was averaged."""
        self.lap()

    def watch(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the micro-batches, and remember their tokens until their step is measured."""
        for batch in loader:
            self._seen.append(batch.tokens)
            yield batch

    def lap(self) -> tuple[float, float]:
        """Return the wall and CPU seconds of this process since the last call."""
        now = time.perf_counter(), time.process_time()
        last, self._last = getattr(self, "_last", now), now
        return now[0] - last[0], now[1] - last[1]

    def mean_loss(self, step: int, losses: list[Tensor], *, is_asked_to_stop: bool) -> float:
        """Return the step's loss; RuntimeError on all ranks if it, or the norm of the gradient that
        was applied, is not finite. Collective."""
        self._num_micro = len(losses)
        # float() waits for the device, so that the next lap holds all work of the step.
        own_loss = float(torch.stack(losses).sum() / len(losses))
        pair = torch.tensor([own_loss, float(is_asked_to_stop)], dtype=torch.float64)
        loss, share_asked = self._mean(pair).tolist()
        self.must_stop = share_asked > 0
        norm = self._engine.grad_norm()
        if math.isfinite(loss) and _is_norm(norm):
            return loss
        if math.isfinite(loss):
            what, where, bad = "gradient's norm is not finite", "a step", self._seen[: len(losses)]
        else:
            what, where = f"loss is {loss}", "a micro-batch"
            bad = [batch for value, batch in zip(losses, self._seen) if not math.isfinite(value)]
        raise RuntimeError(
            f"step {step}: the {what}, in {where} of {self._names(bad)}, and nothing of this step "
            "is saved; look at these samples, then start a new run without them or with a lower "
            "optimizer.lr"
        )

    def _names(self, batches: Sequence[TokenBatch]) -> str:
        """Return the names of all ranks' samples. Collective."""
        found = [key for batch in batches for key in batch.flat_keys]
        everywhere: list[Any] = [found]
        if self._process.world_size > 1:
            everywhere = [None] * self._process.world_size
            dist.all_gather_object(everywhere, found)
        # Ranks that hold one copy of the model together have read the same samples: name them once.
        found = dict.fromkeys(sum(everywhere, []))
        return ", ".join(f"{name} record {number}" for name, number in found) or "unknown samples"

    def row(self, step: int, loss_mean: float) -> dict[str, Any]:
        """Return the step's row for the metrics file. Collective."""
        seconds, cpu_seconds = self.lap()
        flops = self._flops(self._engine.plan(), self._seen[: self._num_micro])
        own = torch.tensor([cpu_seconds, flops], dtype=torch.float64)
        cpu_mean, flops_mean = self._mean(own).tolist()
        counts = self._counts()
        # An online teacher reads ahead: further batches belong to the next step.
        del self._seen[: self._num_micro]
        return {
            "step": step,
            "loss": loss_mean,
            **counts,
            "step_seconds": seconds,
            "cpu_seconds": cpu_mean * self._process.world_size,
            "flops": flops_mean * self._data.world_size,
            "grad_norm": self._engine.grad_norm(),
        }

    def _counts(self) -> dict[str, Any]:
        """Return the step's counts over all data ranks; without elision every token is kept."""
        counts = self._engine.counts()
        if counts is not None:
            return {k: v for k, v in counts.items() if k != "step"}
        tokens = sum(int((batch.segment_BT >= 0).sum()) for batch in self._seen)
        padded = sum(batch.segment_BT.numel() for batch in self._seen) - tokens
        labels = sum(batch.num_labels for batch in self._seen)
        images = sum(int((batch.kind_BT == IMAGE).sum()) for batch in self._seen)
        data = self._data
        tokens, labels, images, padded = sum_over(
            [tokens, labels, images, padded], data.group, data.device
        )
        return {
            "dense": True,
            "tokens_total": tokens,
            "tokens_kept": tokens,
            "answer_total": labels,
            "answer_kept": labels,
            "answer_entered": labels,
            "image_total": images,
            "image_kept": images,
            "filled": 0,
            "padded": padded,
        }

    def _mean(self, value: Tensor) -> Tensor:
        """Return the mean over ranks. It is also that over data ranks: each has as many ranks."""
        value = value.to(self._process.device)
        if self._process.world_size > 1:
            dist.all_reduce(value)
        return value / self._process.world_size


def _is_norm(norm: float | None) -> bool:
    """Return whether a gradient's norm is one. DeepSpeed's ZeRO says -1 for what is not finite."""
    return norm is None or (math.isfinite(norm) and norm >= 0)


def gated_share(model: Any, elision: RegateConfig) -> float:
    """Return the share of the decoder's linear FLOPs, as a mean over layers, that is gated.

    0 where the backward pass alone is: the figures count positions of the forward pass.

    ValueError where the MLP alone is gated and has experts, whose share is not known.
    """
    decoder = model.get_decoder()
    depth, first = decoder.config.num_hidden_layers, elision.first_layer
    last = depth if elision.last_layer is None else elision.last_layer
    if not elision.enabled:
        return 0.0
    parts = {span.part for span in elision.execution.spans(0, 1)}
    if "backward" in parts:
        return 0.0
    if "mlp" not in parts:
        return (last - first) / depth
    kind = decoder.config.model_type
    return sum(mlp_share(layer, kind) for layer in decoder.layers[first:last]) / depth


def peak_memory(process: Process) -> int:
    """Return the largest peak of any rank in bytes, of GPU or else CPU memory. Collective."""
    if process.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(process.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peaks = torch.tensor(float(peak), dtype=torch.float64, device=process.device)
    if process.world_size > 1:
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    return int(peaks)


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return what the progress bar shows of a step."""
    cost = {}
    if "teacher_seconds" in row:
        cost = {"teacher": f"{row['teacher_seconds']:.2f} of {row['step_seconds']:.2f} s"}
    return {"loss": f"{row['loss']:.3f}", "dense": row["dense"], **cost}
