"""The machine: its device, its packages, and how its arithmetic is told to behave."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.torch_version import TorchVersion

OLDEST = {"transformers": "5.17", "deepspeed": "0.19", "megatron.core": "0.16"}
"""With older ones nobody has tried."""


def prepare_environment() -> None:
    """Before anything runs on the device: cuBLAS reads its variable once."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Small models gain nothing of more, and lose much where others compute beside them.
        torch.set_num_threads(1)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def why_missing(package: str) -> str | None:
    """Why a package is not to be used here; None where it is."""
    try:
        module = importlib.import_module(package)
    except Exception as problem:  # A package may break on import in ways of its own.
        return f"{package} is not importable ({type(problem).__name__}: {problem})".splitlines()[0]
    found, oldest = getattr(module, "__version__", None), OLDEST.get(package)
    if oldest is not None and found is not None and TorchVersion(found) < oldest:
        return f"{package} {found} is older than {oldest}, the oldest that was tried"
    return None


@contextmanager
def full_fp32() -> Iterator[None]:
    """Products and convolutions in fp32 are made of fp32, not of TF32."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


@contextmanager
def strictly_repeatable() -> Iterator[None]:
    """The host's own kernels in their deterministic variants.

    Only without ``warn_only``: with it torch 2.11 leaves the backward pass of its fast attention as
    it is, which adds up in any order.
    """
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def plainly_repeatable() -> Iterator[None]:
    """Deterministic where torch can, and attention as plain products."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


REPEATABLE = {
    "the host's kernels": strictly_repeatable,
    "attention as plain products": plainly_repeatable,
}
"""In order of preference."""


def join_alone(device: torch.device) -> None:
    """A process group of this process alone, unless there is one."""
    if dist.is_initialized():
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(alone, MASTER_PORT=str(port))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
