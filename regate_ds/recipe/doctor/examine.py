"""`regate doctor`: check what this node has of what the package needs, and how to get the rest."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from importlib import import_module, metadata
from pathlib import Path

import torch
import torch.distributed as dist

from regate_ds.job.ranks import Ranks, discover
from regate_ds.recipe.config.tree import RunConfig
from regate_ds.recipe.doctor.check import Check
from regate_ds.recipe.doctor.ranks import examine_together
from regate_ds.recipe.estimate.needs import GIB, estimate, existing, free_disk, free_memory

TESTED_PACKAGES = {
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "deepspeed": "0.19.8",
    "peft": "0.21.2",
    "tokenizers": "0.23.3",
    "safetensors": "0.8.0",
    "pillow": "13.0.0",
    "mlxtend": "0.25.0",
    "matplotlib": "3.11.2",
}
"""Packages that the recipe needs, and the versions that the tests ran with."""

MEGATRON_TESTED = ("0.16.1", "0.19.2")

PATIENCE_MINUTES = "2"
"""Time to wait for ranks that do not come; the variable DEEPSPEED_TIMEOUT overrides it."""

_MODULES = {"pillow": "PIL"}
"""Import names of packages that are imported under another name."""

BROKEN = "broken"

_BROKEN = (ImportError, OSError, AttributeError)
"""Errors of importing a package that was built for another torch, CUDA or Python."""


def examine(config: RunConfig | None = None) -> list[Check]:
    """Check versions, devices and kernels, and for a run also memory and disk; change nothing.

    In a job of several ranks it also checks what they do together, and is then collective.
    """
    ranks = discover()
    checks = [
        Check("python", platform.python_version(), True, True, is_version=True),
        *(_package(name, tested) for name, tested in TESTED_PACKAGES.items()),
        _megatron(),
        _device(),
        *(_backend(name) for name in ("gloo", "nccl")),
        _job(ranks),
        _compiler(),
        _apex(),
        _kernels("flash_attn", "attn_implementation=flash_attention_2: pip install flash-attn"),
        _kernels(
            "transformer_engine", "Megatron-core's FP8: pip install transformer-engine[pytorch]"
        ),
        *([] if config is None else _needs(config, ranks)),
    ]
    if ranks.world_size == 1:
        return checks
    return _examine_with_others(config, ranks, checks)


def _examine_with_others(config: RunConfig | None, ranks: Ranks, own: list[Check]) -> list[Check]:
    from regate_ds.job.process import start_process

    os.environ.setdefault("DEEPSPEED_TIMEOUT", PATIENCE_MINUTES)
    process = start_process()
    folder = existing(Path() if config is None else config.run.out)
    axes = {} if config is None else _axes(config)
    checks = examine_together(process, ranks.node, own, axes, folder)
    dist.barrier()
    dist.destroy_process_group()
    return checks


def lacks_required(checks: Sequence[Check]) -> bool:
    return any(check.is_required and not check.is_fine for check in checks)


def as_text(checks: Sequence[Check]) -> str:
    """Return a line for each check: mark, name, what was found, what to do.

    Versions that are as tested share one line.
    """
    as_tested = [c for c in checks if c.is_version and c.is_fine and not c.advice]
    versions = ", ".join(f"{c.name} {c.found}" for c in as_tested)
    others = [c for c in checks if c not in as_tested]
    lines = textwrap.wrap(versions, 90, initial_indent="ok       ", subsequent_indent=" " * 9)
    lines += [f"{_mark(c):<9}{c.name:<20}{c.found:<20} {c.advice}".rstrip() for c in others]
    end = "all required is here"
    if lacks_required(checks):
        end = "something required is missing or broken"
    return "\n".join([*lines, "", end])


def as_json(checks: Sequence[Check]) -> str:
    return json.dumps([asdict(check) for check in checks], indent=2)


def _mark(check: Check) -> str:
    if check.is_fine:
        return "ok"
    if not check.is_required:
        return "-"
    return "BROKEN" if check.found == BROKEN else "MISSING"


def _package(name: str, tested: str) -> Check:
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "absent", True, False, "pip install -e '.[recipe]'")
    try:
        # A package may print while it is imported; stdout is for the checks alone.
        with redirect_stdout(sys.stderr):
            import_module(_MODULES.get(name, name))
    except (*_BROKEN, RuntimeError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return Check(name, BROKEN, True, False, f"{found}: {first_line}")
    # The local tag of a build ("+cpu") does not make it another version.
    advice = "" if found.split("+")[0] == tested else f"tested with {tested}"
    return Check(name, found, True, True, advice, is_version=True)


def _device() -> Check:
    if torch.cuda.is_available():
        first = torch.cuda.get_device_properties(0)
        memory = f"{first.total_memory / 2**30:.0f} GiB"
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: set run.precision=fp32"
        return Check(
            "GPUs", f"{torch.cuda.device_count()} x {first.name}, {memory}, {bf16}", False, True
        )
    if shutil.which("nvidia-smi") is not None:
        advice = f"nvidia-smi is here, but torch {torch.__version__} sees no GPU: check its build"
        return Check("GPUs", "none", False, False, advice)
    return Check("GPUs", f"none; {os.cpu_count()} CPU cores", False, True)


def _backend(name: str) -> Check:
    is_needed = (name == "nccl") == torch.cuda.is_available()
    if not dist.is_available() or not dist.is_backend_available(name):
        advice = f"this build of torch has no {name}" if is_needed else "for GPUs only"
        return Check(name, "absent", is_needed, False, advice)
    if name == "nccl" or dist.is_initialized():
        return Check(name, "present", is_needed, True)
    return _try_gloo(is_needed)


def _try_gloo(is_needed: bool) -> Check:
    """Sum over a group of one rank, which shows that a network interface can be bound."""
    try:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    except RuntimeError as error:
        advice = f"set GLOO_SOCKET_IFNAME to a network interface: {' '.join(str(error).split())}"
        return Check("gloo", "present, but fails", is_needed, False, advice)
    dist.all_reduce(torch.ones(1))
    dist.destroy_process_group()
    return Check("gloo", "works", is_needed, True)


def _job(ranks: Ranks) -> Check:
    if ranks.launcher == "none":
        return Check("launcher", "none; one process", False, True)
    text = f"{ranks.launcher}, first rank at {ranks.address}:{ranks.port}"
    return Check("launcher", text, False, True)


def _axes(config: RunConfig) -> dict[str, int]:
    sizes = {name: getattr(config.parallel, name, 1) for name in ("tensor", "context", "pipeline")}
    return {name: size for name, size in sizes.items() if size > 1}


def _needs(config: RunConfig, ranks: Ranks) -> list[Check]:
    needs = estimate(config, ranks.world_size)
    memory_advice = "more ranks, a higher ZeRO stage in run.deepspeed, or model.lora need less"
    memory = free_memory(ranks)
    disk_advice = f"free disk space for {config.run.out}, or lower run.keep_checkpoints"
    return [
        _room("memory of a rank", needs.memory, memory, memory_advice),
        _room("disk", needs.disk, free_disk(config.run.out), disk_advice),
    ]


def _room(name: str, needed: int, free: int, advice: str) -> Check:
    is_fine = needed <= free
    text = f"needs {needed / GIB:.1f} GiB, {free / GIB:.1f} free"
    return Check(name, text, True, is_fine, "" if is_fine else advice)


def _megatron() -> Check:
    """Check the version without importing it: that takes seconds, and may need a GPU."""
    try:
        found = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        use = "optional, for Megatron models: pip install -e '.[megatron]'"
        return Check("megatron-core", "absent", False, False, use)
    advice = "" if found in MEGATRON_TESTED else f"tested with {', '.join(MEGATRON_TESTED)}"
    return Check("megatron-core", found, False, True, advice, is_version=True)


def _compiler() -> Check:
    path = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    advice = "" if path else "torch.compile and deepspeed's kernels need one: install gcc"
    return Check("C compiler", path or "absent", False, path is not None, advice)


def _apex() -> Check:
    """Check that apex is NVIDIA's, and not PyPI's project of the same name."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        use = "optional, for Megatron-core's fused kernels: build NVIDIA's from its source"
        return Check("apex", "absent", False, False, use)
    # Look at its files first: the other project cannot be imported safely.
    if not any((Path(p) / "optimizers").is_dir() for p in spec.submodule_search_locations or ()):
        advice = "PyPI's apex is another project: pip uninstall apex, then build NVIDIA's"
        return Check("apex", "not NVIDIA's", False, False, advice)
    try:
        _ = import_module("apex.optimizers").FusedAdam
    except _BROKEN as error:
        advice = f"build it again: {' '.join(str(error).split())}"
        return Check("apex", "present, but fails", False, False, advice)
    return Check("apex", "NVIDIA's", False, True)


def _kernels(name: str, use: str) -> Check:
    if importlib.util.find_spec(name) is None:
        return Check(name, "absent", False, False, f"optional, for {use}")
    try:
        module = import_module(name)
    except _BROKEN as error:
        advice = f"build it for torch {torch.__version__}: {' '.join(str(error).split())}"
        return Check(name, "present, but fails", False, False, advice)
    return Check(name, str(getattr(module, "__version__", "present")), False, True)
