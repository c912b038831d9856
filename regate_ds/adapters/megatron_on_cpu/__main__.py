"""Run a script of Megatron-LM's kind on CPUs, to try it.

    python -m regate_ds.adapters.megatron_on_cpu SCRIPT [ARGUMENT ...]

Adds to the shim what ``megatron.training`` asks of CUDA.
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
from regate_ds.adapters.megatron_on_cpu.modules import Norm


def install_for_training() -> None:
    shim.install()
    # One device, so that Megatron makes its groups; its name is never used.
    torch.cuda.device_count = lambda: 1
    device = SimpleNamespace(name="cpu", major=9, minor=0, total_memory=1 << 30)
    torch.cuda.get_device_properties = lambda *_: device  # type: ignore[assignment]
    torch.cuda.Event = _Event  # type: ignore[assignment,misc]
    if importlib.util.find_spec("megatron.training") is None:
        return
    from megatron.core.models.vision.clip_vit_model import CLIPViTModel
    from megatron.training import initialize, training

    # Without Transformer Engine its norm is torch's, which does not take the arguments it is given.
    CLIPViTModel.__init__ = partialmethod(CLIPViTModel.__init__, ln_pre_impl=Norm)  # type: ignore

    # The wheel has them compiled, and no makefile.
    initialize._compile_dependencies = lambda: None
    training.initialize_megatron = partial(training.initialize_megatron, allow_no_cuda=True)


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...


if __name__ == "__main__":
    install_for_training()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
