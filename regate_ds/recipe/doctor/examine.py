"""`regate doctor`: what this machine has of what the package needs, and how to get the rest."""

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
"""What the recipe needs, and the versions that the tests ran with."""

MEGATRON_TESTED = ("0.16.1", "0.19.2")

PATIENCE_MINUTES = "2"
"""For ranks that do not come; DEEPSPEED_TIMEOUT says otherwise."""

_MODULES = {"pillow": "PIL"}
"""Where a package is imported by another name."""

BROKEN = "broken"

_BROKEN = (ImportError, OSError, AttributeError)
"""What importing a package ends in that was built for another torch, CUDA or Python."""


def examine(config: RunConfig | None = None) -> list[Check]:
    """Look at versions, devices, kernels and, for a run, at memory and disk.

    Under a launcher also at the other ranks, and then collective. Nothing is changed.
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
    return _together(config, ranks, checks)


def _together(config: RunConfig | None, ranks: Ranks, own: list[Check]) -> list[Check]:
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
    return any(f.is_required and not f.is_fine for f in checks)


def as_text(checks: Sequence[Check]) -> str:
    """A line for each check: a mark, its name, what was found, what to do. Versions as tested
    share one.
    """
    usual = [f for f in checks if f.is_version and f.is_fine and not f.advice]
    versions = ", ".join(f"{f.name} {f.found}" for f in usual)
    shown = [f for f in checks if f not in usual]
    lines = textwrap.wrap(versions, 90, initial_indent="ok       ", subsequent_indent=" " * 9)
    lines += [f"{_mark(f):<9}{f.name:<20}{f.found:<20} {f.advice}".rstrip() for f in shown]
    end = "all required is here"
    if lacks_required(checks):
        end = "something required is missing or broken"
    return "\n".join([*lines, "", end])


def as_json(checks: Sequence[Check]) -> str:
    return json.dumps([asdict(f) for f in checks], indent=2)


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
        # What a package prints while it is imported is no check.
        with redirect_stdout(sys.stderr):
            import_module(_MODULES.get(name, name))
    except (*_BROKEN, RuntimeError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return Check(name, BROKEN, True, False, f"{found}: {first_line}")
    # A build's own part ("+cpu") is no other version.
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
    return _tried_gloo(is_needed)


def _tried_gloo(is_needed: bool) -> Check:
    """Sum over a group of one: shows that a network interface can be bound."""
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
    less = "more ranks, a higher ZeRO stage in run.deepspeed, or model.lora need less"
    memory = free_memory(ranks)
    fewer = f"{config.run.out}: free some, or lower run.keep_checkpoints"
    return [
        _room("memory of a rank", needs.memory, memory, less),
        _room("disk", needs.disk, free_disk(config.run.out), fewer),
    ]


def _room(name: str, needed: int, free: int, advice: str) -> Check:
    is_fine = needed <= free
    text = f"needs {needed / GIB:.1f} GiB, {free / GIB:.1f} free"
    return Check(name, text, True, is_fine, "" if is_fine else advice)


def _megatron() -> Check:
    """Not imported: that takes seconds, and may need a GPU."""
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
    """NVIDIA's apex, none, or the project of the same name on PyPI."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        use = "optional, for Megatron-core's fused kernels: build NVIDIA's from its source"
        return Check("apex", "absent", False, False, use)
    # Judged by its files: the other project cannot be imported safely.
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
