"""Megatron-core on CPUs over gloo, to try a layout or a script of yours where there is no GPU.

`shim.install()` answers what megatron-core asks of CUDA; `modules.py` stands in for Transformer
Engine; `python -m regate_ds.adapters.megatron_on_cpu SCRIPT` runs a script so. Nothing else in
regate_ds imports it.
"""
