"""accelerate as a loop's host: ``accelerator.backward`` divides by the accumulation.

accelerate is not imported; its Accelerator is known by where its class is defined. Tested with
accelerate 1.15.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from regate_ds.adapters.torch.engine import EngineHost
from regate_ds.adapters.torch.plain import ShardedParts
from regate_ds.parallel.layout import num_ranks

_KNOWN = ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED", "FSDP")


class AcceleratorHost:
    """The host of a loop around an ``Accelerator``, which itself may run DDP or DeepSpeed."""

    name, joined_by = "Accelerator", "Accelerator()"
    divides_by_accumulation = True

    def __init__(self, accelerator: Any, model: nn.Module) -> None:
        self.given, self._sharded = accelerator, ShardedParts(model)

    @property
    def device(self) -> torch.device:
        return self.given.device

    @property
    def num_ranks(self) -> int:
        # Without a GPU and cpu=True, accelerate sees one process where DeepSpeed sees all.
        return self.given.num_processes if self._engine is None else self._engine.num_ranks

    @property
    def group(self) -> ProcessGroup | None:
        return dist.group.WORLD if self.num_ranks > 1 else None

    @property
    def accumulation(self) -> int:
        return self.given.gradient_accumulation_steps

    @property
    def divides_ranks_by(self) -> float:
        return self._sharded.divides_ranks_by(self.num_ranks)

    @property
    def stage(self) -> int:
        return self._sharded.stage if self._engine is None else self._engine.stage

    @property
    def _engine(self) -> EngineHost | None:
        wrapped = getattr(self.given, "deepspeed_engine_wrapped", None)
        return None if wrapped is None else EngineHost(wrapped.engine)

    @property
    def steps_taken(self) -> int:
        return 0 if self._engine is None else self._engine.steps_taken

    def require(self) -> None:
        given, engine = self.given, self._engine
        kind, parallel = given.distributed_type.value, given.parallelism_config
        refused = {
            f"distributed_type={kind}; use one process, DDP, FSDP2 or DeepSpeed": (
                kind not in _KNOWN
            ),
            "fsdp_version=1, which hides the model's parameters; set fsdp_version=2": (
                kind == "FSDP" and not given.is_fsdp2
            ),
            f"{parallel}, which cuts samples over ranks; leave tp_size, cp_size and sp_size at 1": (
                parallel is not None and parallel.non_data_parallel_size > 1
            ),
            "dispatch_batches=True, as plans are made on the rank that reads the data; set it "
            "False": bool(given.dispatch_batches),
            f"{self.num_ranks} of this job's {num_ranks()} ranks; give cpu=True where there is no "
            "GPU": self.num_ranks != num_ranks(),
            "DeepSpeed before accelerator.prepare; call it before regate.windows": (
                kind == "DEEPSPEED" and engine is None
            ),
            f"an engine of another accumulation than its own {self.accumulation}; give both the "
            "same": engine is not None and engine.accumulation != self.accumulation,
        }
        for reason, is_so in refused.items():
            if is_so:
                raise ValueError(f"accelerate is not supported with {reason}")
        if engine is not None:
            engine.require()

    def require_boundary(self) -> None:
        """Nothing: accelerate counts by itself, see ``begin``."""

    def begin(self, num_micro: int) -> None:
        """Make ``accelerator.accumulate`` end its step with the last of these micro-batches.

        They have been read, so the loader may be at its end: accelerate would then take each of
        them for the last one.
        """
        self._sharded.find()
        state = self.given.gradient_state
        if not state.sync_with_dataloader:
            raise ValueError(
                "sync_with_dataloader=False carries micro-batches over the loader's end, where "
                "windows end; set it True in the GradientAccumulationPlugin"
            )
        self.given.step = self.accumulation - num_micro
        if num_micro > 1 and state.in_dataloader:
            state.active_dataloader.end_of_dataloader = False


def is_accelerator(given: Any) -> bool:
    """Return whether it is accelerate's Accelerator, or derived from it."""
    homes = [each.__module__.split(".")[0] for each in type(given).__mro__]
    return "accelerate" in homes and hasattr(given, "gradient_state")
