"""Run a script around Megatron-core or Megatron-LM on CPUs, to try it.

    python -m regate_ds.adapters.megatron_on_cpu SCRIPT [ARGUMENT ...]

It installs the shim, and answers what ``megatron.training`` asks of CUDA.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from functools import partial, partialmethod
from types import SimpleNamespace
from typing import Any

import torch

from regate_ds.adapters.megatron_on_cpu import shim
from regate_ds.adapters.megatron_on_cpu.bridge import install_for_bridge
from regate_ds.adapters.megatron_on_cpu.modules import Norm


def install_for_training() -> None:
    """Install the shim, and what ``megatron.training`` needs besides it, if that is installed."""
    shim.install()
    # Megatron makes its groups only if there is a device; the name of the device is never used.
    torch.cuda.device_count = lambda: 1
    # A CUDA build of torch may answer by that count, and scripts choose their backend by it.
    torch.cuda.is_available = lambda: False
    device = SimpleNamespace(name="cpu", major=9, minor=0, total_memory=1 << 30)
    torch.cuda.get_device_properties = lambda *_: device  # type: ignore[assignment]
    torch.cuda.Event = _Event  # type: ignore[assignment,misc]
    if importlib.util.find_spec("megatron.training") is None:
        return
    from megatron.core.models.vision.clip_vit_model import CLIPViTModel
    from megatron.training import initialize, training

    # Without Transformer Engine the model uses torch's norm, which does not take its arguments.
    CLIPViTModel.__init__ = partialmethod(CLIPViTModel.__init__, ln_pre_impl=Norm)  # type: ignore

    # The wheel has these dependencies compiled, and has no makefile.
    initialize._compile_dependencies = lambda: None
    training.initialize_megatron = partial(training.initialize_megatron, allow_no_cuda=True)


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...


if __name__ == "__main__":
    install_for_training()
    install_for_bridge()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
