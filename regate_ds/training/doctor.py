"""`regate doctor`: what this machine has of what the package needs, and how to get the rest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module, metadata

import torch
import torch.distributed as dist

TESTED = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "deepspeed": "0.19.8",
}
"""Versions that the tests ran with."""

_PACKAGES = (*TESTED, "peft", "tokenizers", "safetensors", "pillow", "mlxtend", "matplotlib")


@dataclass(frozen=True)
class Finding:
    """One thing looked at; ``advice`` is empty where nothing is to be done."""

    name: str
    found: str
    is_required: bool
    is_fine: bool
    advice: str = ""


def examine() -> list[Finding]:
    """Look at versions, devices and optional kernels; nothing is changed."""
    return [
        *(_package(name) for name in _PACKAGES),
        _compiler(),
        _device(),
        _backends(),
        _apex(),
        _optional("flash_attn", "attention over packed rows on GPUs: pip install flash-attn"),
        _optional("transformer_engine", "FP8 and packed attention in Megatron-core layers"),
    ]


def lacks_required(findings: Sequence[Finding]) -> bool:
    return any(f.is_required and not f.is_fine for f in findings)


def as_text(findings: Sequence[Finding]) -> str:
    marks = {True: "ok", False: "--"}
    lines = [
        f"{marks[f.is_fine]:<4}{f.name:<20}{f.found}{'   ' + f.advice if f.advice else ''}"
        for f in findings
    ]
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> str:
    return json.dumps([asdict(f) for f in findings], indent=2)


def _package(name: str) -> Finding:
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "missing", True, False, "pip install -e '.[recipe]'")
    tested = TESTED.get(name)
    differs = tested is not None and found.split("+")[0] != tested
    return Finding(name, found, True, True, f"tested with {tested}" if differs else "")


def _compiler() -> Finding:
    path = shutil.which("cc") or shutil.which("gcc")
    advice = "" if path else "deepspeed builds its kernels with it: install gcc"
    return Finding("C compiler", path or "missing", False, path is not None, advice)


def _device() -> Finding:
    if not torch.cuda.is_available():
        return Finding("device", "CPU", False, True)
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return Finding("device", f"{torch.cuda.device_count()} x {', '.join(names)}", False, True)


def _backends() -> Finding:
    backends = [n for n in ("nccl", "gloo") if dist.is_backend_available(n)]
    advice = "" if backends else "this torch has no backend for several processes"
    return Finding("collectives", ", ".join(backends) or "none", True, bool(backends), advice)


def _apex() -> Finding:
    try:
        apex = import_module("apex")
    except ImportError:
        return Finding("apex", "absent", False, True, "optional; build NVIDIA's from source")
    try:
        found = hasattr(import_module("apex.optimizers"), "FusedAdam")
    except ImportError:
        found = False
    if found:
        return Finding("apex", "NVIDIA apex", False, True)
    advice = "PyPI's apex is another project: pip uninstall apex"
    return Finding("apex", str(getattr(apex, "__file__", "apex")), False, False, advice)


def _optional(name: str, use: str) -> Finding:
    try:
        version = getattr(import_module(name), "__version__", "present")
    except ImportError:
        return Finding(name, "absent", False, True, f"optional; {use}")
    return Finding(name, str(version), False, True)
