"""Run Megatron-core on CPUs over gloo, to try a layout or a script where there is no GPU.

`shim.install()` answers what megatron-core asks of CUDA, `modules.py` replaces Transformer Engine's
norm and attention, and `bridge.py` does both for Megatron-Bridge. These files may import torch and
Megatron; nothing else in regate_ds imports them. Start with
`python -m regate_ds.adapters.megatron_on_cpu SCRIPT`, which runs a script.
"""
