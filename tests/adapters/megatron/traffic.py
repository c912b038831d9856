"""Bytes that the ranks of a step send each other, dense and elided; the table of docs/traffic.md.

    python -m tests.adapters.megatron.traffic

Every call of torch.distributed in a step's forward and backward passes is counted as it is made, on
gloo, on every rank. A rank sends of a reduction over n ranks 2 (n-1)/n of the tensor, of a gather
or a scatter (n-1)/n of the whole, as a ring does, of an exchange what leaves it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.adapters.megatron.cases_helper import Case
from tests.adapters.megatron.pool_helper import Pool
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "traffic.md"
KINDS = ("stages", "tensor", "context", "moves", "plan", "gradients")
LAYOUTS: dict[str, dict[str, Any]] = {
    "PP 2": {"pp": 2},
    "PP 4": {"pp": 4},
    "PP 4, last_layer 3": {"pp": 4, "last_layer": 3},
    "TP 2": {"tp": 2},
    "TP 2, SP": {"tp": 2, "sp": True},
    "TP 2, SP, first_layer 0": {"tp": 2, "sp": True, "first_layer": 0},
    "CP 2 (own attention)": {"cp": 2},
    "CP 2 (own attention), first_layer 0": {"cp": 2, "first_layer": 0},
    "TP 2, SP, PP 2": {"tp": 2, "sp": True, "pp": 2},
    "DP 2": {"dp": 2},
}


@contextmanager
def counted(found: Counter[str]) -> Iterator[None]:
    """Count what this rank sends, by the kind of its group or of its caller."""
    with ExitStack() as stack:
        for name, size_of in SENT.items():
            host = getattr(dist, name)
            ours = _counting(host, size_of, found)
            for module, own_name in _homes(host):
                setattr(module, own_name, ours)
                stack.callback(setattr, module, own_name, host)
        yield


def _homes(function: Any) -> list[tuple[Any, str]]:
    """Where a function of torch.distributed is looked up: Megatron-core has names of its own."""
    modules = [m for name, m in [*sys.modules.items()] if name.startswith("megatron.core")]
    found = [(m, name) for m in modules for name, x in [*vars(m).items()] if x is function]
    return [*found, *((dist, name) for name, x in [*vars(dist).items()] if x is function)]


def _bytes(x: Any) -> int:
    return x.numel() * x.element_size()


def _whole(args: Any, kwargs: Any, group: Any, size: int) -> float:
    return 2 * (size - 1) / size * _bytes(args[0])


def _part(args: Any, kwargs: Any, group: Any, size: int) -> float:
    """Of a gather into one tensor, or of a scatter out of one, the larger is the whole."""
    return (size - 1) / size * max(_bytes(x) for x in args[:2] if isinstance(x, Tensor))


def _lists(args: Any, kwargs: Any, group: Any, size: int) -> float:
    return (size - 1) * max(_bytes(x) for x in args[:2] if isinstance(x, Tensor))


def _exchange(args: Any, kwargs: Any, group: Any, size: int) -> float:
    given, splits = args[1], kwargs.get("input_split_sizes", args[3] if len(args) > 3 else None)
    rank = dist.get_rank(group)
    rows = [len(given) // size] * size if splits is None else list(splits)
    return (sum(rows) - rows[rank]) * _bytes(given) / max(1, len(given))


def _message(args: Any, kwargs: Any, group: Any, size: int) -> float:
    return _bytes(args[0])


def _broadcast(args: Any, kwargs: Any, group: Any, size: int) -> float:
    if "group_src" in kwargs:
        is_source = kwargs["group_src"] == dist.get_rank(group)
    else:
        is_source = kwargs.get("src", args[1] if len(args) > 1 else 0) == dist.get_rank()
    return (size - 1) * _bytes(args[0]) if is_source else 0.0


SENT: dict[str, Callable[[Any, Any, Any, int], float]] = {
    "all_reduce": _whole,
    "all_gather": _lists,
    "all_gather_into_tensor": _part,
    "_all_gather_base": _part,
    "reduce_scatter_tensor": _part,
    "_reduce_scatter_base": _part,
    "all_to_all_single": _exchange,
    "isend": _message,
    "send": _message,
    "broadcast": _broadcast,
}


def _counting(host: Any, size_of: Any, found: Counter[str]) -> Any:
    @wraps(host)
    def called(*args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        if group is None:
            group = next((x for x in args if isinstance(x, dist.ProcessGroup)), None)
        size = dist.get_world_size(group)
        # Megatron names the arguments of a message, its tensor first.
        found[_kind(group)] += round(size_of(args or [*kwargs.values()], kwargs, group, size))
        return host(*args, **kwargs)

    return called


def _kind(group: Any) -> str:
    """What a call is for, by who makes it: the nearest file on the stack that tells."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        for kind, endings in CALLERS.items():
            if file.endswith(endings):
                return kind
        frame = frame.f_back
    raise AssertionError(f"who calls a collective over {group}?")


CALLERS = {
    "plan": ("adapters/plan_wire.py", "regate_ds/session.py", "adapters/megatron/groups.py"),
    "moves": ("parallel/resharding.py", "adapters/megatron/bypass.py"),
    "context": ("megatron_on_cpu/modules.py",),
    "stages": ("pipeline_parallel/p2p_communication.py",),
    "gradients": (
        "distributed/param_and_grad_buffer.py",
        "distributed/finalize_model_grads.py",
        "pipeline_parallel/schedules.py",
    ),
    "tensor": ("tensor_parallel/mappings.py", "tensor_parallel/layers.py")
    + ("tensor_parallel/cross_entropy.py", "core/utils.py"),
}


def count(case: Case) -> Counter[str]:
    """What this rank sends in one step of the case, planning included."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from tests.adapters.megatron import checks_helper as checks
    from tests.adapters.megatron.build_helper import build, join

    join(case)
    chunks = build(case)
    regate = checks.attached(case, chunks)
    found: Counter[str] = Counter()
    with counted(found):
        schedule = regate.wrap(get_forward_backward_func())
        checks.run_chunks(case, chunks, schedule, checks.forward_step(case))
    assert regate.run is not None
    if case.last_layer is None:
        assert found["stages"] == regate.run.sent_bytes(), "what was counted is not what was sent"
    regate.step(applied=True)
    checks.dismantle(chunks)
    return found


def main() -> int:
    pool, lines = Pool(), []
    for name, sizes in LAYOUTS.items():
        case = Case(**sizes, length=96, rows=4, num_micro=4, keep_share=0.25)
        for kind, one in (("dense", replace(case, dense=True)), ("elided", case)):
            total: Counter[str] = sum(pool.run(one.world, count, one), Counter())
            cells = [f"{total[k] / 1000:,.1f}" if total[k] else "" for k in KINDS]
            lines.append(f"| {name} | {kind} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    pool.close()
    PAGE.write_text(HEAD + "\n".join(lines) + "\n")
    return 0


HEAD = f"""# What ranks send each other

Written by `make traffic`: do not edit.

Thousands of bytes that all ranks send together in one step of a small model on gloo (four layers of
32 values, four micro-batches of four rows with 96 positions, fp32; a quarter of the answer tokens
kept), counted call by call. A rank sends 2 (n-1)/n of what n ranks reduce, and (n-1)/n of what they
gather or scatter, as a ring does. Columns: activations and gradients between stages; collectives of
tensor and of sequence parallelism; keys and values of context parallelism; rows that change owner
because kept rows are cut anew, and elided rows on their way around the range; the plan; gradients
of weights, which no plan changes.

| layout | step | {" | ".join(KINDS)} |
| --- | --- | {" | ".join(["---:"] * len(KINDS))} |
"""

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
